"""What a user may get wrong, through the real entry point: one line that names the option, status 2, nothing left behind."""
# ruff: noqa: E501 - a line of the table is one case

import os
import random
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import error_line, read_lines, run_dir, summary, write_lines
from transformers import AutoConfig, AutoModelForCausalLM

from slzo.__main__ import main
from slzo.checkpoints import checkpoint_file
from slzo.zo import stepper
from tiny import make_tokenizer

TEMPLATE = (
    "--data.task=slzo.tasks.template.TemplateTask --data.task.train_file=rows.jsonl --data.task.test_file=rows.jsonl "
    '--data.task.candidates=\'[" bad", " good"]\''
)

# options and what the line says
WRONG = """
--model.scope=ActivationSubspace --model.scope.rank=0 | model.scope.rank 0: must be at least 1
--model.scope=PrefixTuning --model.scope.num_tokens=0 | model.scope.num_tokens 0: must be at least 1
--model.scope=PrefixTuning --model.scope.tokens=3 | model.scope.tokens: unknown option of the chosen class
--model.scope=OutlierChannels --model.scope.percent=0 | model.scope.percent 0.0: must be above 0
--model.scope=OutlierChannels --model.scope.percent=101 | model.scope.percent 101.0: must be above 0 and at most 100
--model.scope=ActivationSubspace --model.scope.rank=1000 | model.scope.rank 1000
--model.scope=LoRA --model.scope.rank=0 | model.scope.rank 0: must be at least 1
--model.scope=LoRA --model.scope.rank=33 | model.scope.rank 33: the model is 32 wide, and no map in it has a higher rank; give at most 32
--model.scope=LoRA --model.scope.rank=abc | model.scope.rank 'abc': expected a whole number
--model.scope.rank=4 --model.scope=LoRA | model.scope.rank: give the class before its options, as in --model.scope CLASS --model.scope.rank VALUE; choose one of A
--model.scope=LoRA --model.scope.layer=3 | model.scope.layer: unknown option of the chosen class LoRA
--model.optimizer.momentum=0.9 --model.optimizer=SGD --data.foo=1 | data.foo: unknown option
--model.estimator.shaping=x --model.estimator=EvolutionStrategy | model.estimator.shaping 'x': choose one of zscore, r
--data.max_length -h | data.max_length '': expected a whole number
--config 'config: rate.yaml' | config
--model.scope=LoRA --model.scope.layers=3 | model.scope.layers '3': expected a list like [1, 2] or all
--model.scope=LoRA --model.scope.alpha=-1 | model.scope.alpha -1.0: must be a number above 0
--model.scope=LoRA --model.scope.target_modules=[nope] | model.scope.target_modules 'nope': layer 0 has no such linear map
--model.scope=LoRA --model.scope.layers=[99] | model.scope.layers 99: the model has 4 decoder layers
--model.scope=LayerScope --model.scope.part=mpl | model.scope.part 'mpl': choose one of layer
--model.scope=LayerScope --model.scope.layers=[] | model.scope.layers []: give at least one layer
--model.scope=SmallestWeights --model.scope.fraction=2 | model.scope.fraction 2.0: the share of weights must be above 0
--model.scope=nope.Nope | model.scope 'nope.Nope': nope cannot be imported
--model.scope=torch.nn.Linear | model.scope 'torch.nn.Linear': is not one of the expected classes; give one such as ActivationSubspace
--model.scope=3 | model.scope '3': no such class
--model.scope='{"class_path": "LoRA", "init_args": {"rank": 0}}' | model.scope.rank 0: must be at least 1
--model.estimator=LOZO --model.estimator.rank=0 | model.estimator.rank 0: must be at least 1
--model.estimator=LOZO --model.estimator.interval=0 | model.estimator.interval 0: must be at least 1
--model.estimator=FZOO | model.num_queries 1: FZOO divides by the spread of several losses
--model.estimator=EvolutionStrategy --model.estimator.shaping=log | model.estimator.shaping 'log': choose one of zscore, rank
--model.estimator=EvolutionStrategy --model.estimator.antithetic=false | model.num_queries 1: EvolutionStrategy compares the members
--model.estimator=EvolutionStrategy --model.estimator.antithetic=3 | model.estimator.antithetic '3': expected true or false
--model.estimator=Backprop --data.objective=metric | data.objective CandidateErrors: has no derivative, which Backprop
--model.estimator=Adam | model.estimator 'Adam': no such class; choose one of
--model.eps=0 | model.eps 0.0: must be a number above 0
--model.eps=-1 | model.eps -1.0: must be a number above 0
--model.eps=abc | model.eps 'abc': expected a number or auto
--model.epz=1 | model.epz: unknown option; did you mean model.eps?
--trainer.default_root_dir=memory://all | trainer.default_root_dir 'memory://all': is not a folder of this machine
--trainer.logger=TensorBoardLogger --trainer.logger.save_dir=memory://all | trainer.logger.save_dir 'memory://all': is not a
--checkpoint.dirpath=memory://all | checkpoint.dirpath 'memory://all': is not a folder of this machine; give one
--trainer.max_step=3 | trainer.max_step: unknown option; did you mean trainer.max_steps?
--model.max_step=3 | model.max_step: unknown option; did you mean trainer.max_steps?
--data.train_file=rows.jsonl | data.train_file: unknown option; did you mean data.task.train_file, an option of ChatTask, TemplateTask?
--data.task=slzo.tasks.template.TemplateTask --data.train_files=rows.jsonl | data.train_files: unknown option; did you mean data.task.train_file?
--model.eps=1e39 | model.eps 1e+39: must be a number above 0 and at most 1e+30
--model.eps=inf | model.eps 'inf': expected a number
--model.eps=nan | model.eps 'nan': expected a number
--model.eps= | model.eps '': expected a number
--model.num_queries=0 | model.num_queries 0: must be 1 to
--model.num_queries=1.5 | model.num_queries '1.5': expected a whole number
--model.num_queries=9999999999999999999999 | model.num_queries 9999999999999999999999: must be 1 to
--model.max_nonfinite=0 | model.max_nonfinite 0: must be at least 1
--model.layer=1.5 | model.layer '1.5': expected a whole number or null
--model.layer=4 | model.layer 4: the model has 4 decoder layers; choose 0 to 3
--model.layer=-1 | model.layer -1: the model has 4 decoder layers
--model.model= | model.model '': is empty; give a built-in name
--model.model=./nope | model.model './nope': no such folder
--model.model=nope.gguf | model.model 'nope.gguf': no such GGUF file
--model.model=. | model.model '.': the folder has no config.json
--model.model=/dev/null | model.model '/dev/null': no such folder
--model.dtype=int8 | model.dtype 'int8': choose one of float32
--model.seed=x | model.seed 'x': expected a whole number or null
--model.optimizer=Adam --model.optimizer.lr=-1 | model.optimizer: Invalid learning rate: -1.0
--model.optimizer=Adam --model.optimizer.betas=[2,3] | model.optimizer: Invalid beta parameter at index 0: 2.0
--model.optimizer=Adam --model.optimizer.betas=x | model.optimizer.betas 'x': expected a list of 2 values
--model.optimizer=SGD --model.optimizer.nesterov=true | model.optimizer: Nesterov momentum requires a momentum
--model.optimizer=SGD --model.optimizer.lr=nan | model.optimizer.lr 'nan': expected a number
--model.optimizer=SparseAdam | model.optimizer SparseAdam: cannot take a zeroth-order gradient
--model.optimizer=LBFGS | model.optimizer LBFGS: cannot take
--model.optimizer=Muon | model.optimizer Muon: cannot take
--model.optimizer=SGD --model.optimizer.momentum=1 --model.optimizer.lr=auto --model.estimator=SPSA | model.optimizer.momentum 1: must be below 1 with model.optimizer.lr auto
--model.optimizer=Rprop --model.lr_scheduler=ExponentialLR --model.lr_scheduler.gamma=0.5 | model.lr_scheduler: has no effect with Rprop
--model.optimizer=SGD --model.optimizer.maximize=true | model.optimizer.maximize true: maximizes the loss
--model.optimizer=torch.optim.SDG | model.optimizer 'torch.optim.SDG': no such class; did you mean SGD?
--model.optimizer.lrr=1 | model.optimizer.lrr: unknown option of the chosen class
--model.lr_scheduler=OneCycleLR --model.lr_scheduler.max_lr=0.1 --model.lr_scheduler.total_steps=3 | model.lr_scheduler: Tried to step 4 times. The specified number of total steps is 3 (the run takes 8 steps)
--model.lr_scheduler=OneCycleLR --model.lr_scheduler.max_lr=0.1 --model.lr_scheduler.total_steps=7 --trainer.max_steps=-1 --trainer.max_epochs=3 | model.lr_scheduler: Tried to step 8 times. The specified number of total steps is 7 (the run takes 15 steps)
--model.lr_scheduler=OneCycleLR --model.lr_scheduler.max_lr=0.1 --model.lr_scheduler.total_steps=-1 | model.lr_scheduler: Expected positive integer total_steps
--model.lr_scheduler=StepLR --model.lr_scheduler.step_size=0 | model.lr_scheduler: cannot take a step (integer modulo by zero)
--model.lr_scheduler=StepLR | model.lr_scheduler: the chosen class needs step_size
--model.lr_scheduler=CosineAnnealingLR --model.lr_scheduler.T_max=0 | model.lr_scheduler: cannot take a step
--model.lr_scheduler=LinearLR --model.lr_scheduler.start_factor=3 | model.lr_scheduler: Starting multiplicative factor
--model.lr_scheduler=ChainedScheduler | model.lr_scheduler 'ChainedScheduler': cannot be used: its schedulers need the optimizer
--model.lr_scheduler='{"class_path": "torch.optim.lr_scheduler.SequentialLR", "init_args": {"milestones": [2], "schedulers": [{"class_path": "ConstantLR"}]}}' | model.lr_scheduler 'torch.optim.lr_scheduler.SequentialLR': cannot be used: its schedulers need the optimizer
--model.lr_scheduler='{"class_path": "torch.optim.lr_scheduler.ChainedScheduler", "init_args": {"schedulers": [{"class_path": "ConstantLR"}]}}' | model.lr_scheduler 'torch.optim.lr_scheduler.ChainedScheduler': cannot be used: its schedulers need the optimizer
--model.lr_scheduler=LambdaLR --model.lr_scheduler.lr_lambda=math.nope | model.lr_scheduler.lr_lambda 'math.nope': expected the path of a function, such as my_module.my_function
--model.lr_scheduler=ReduceLROnPlateau | model.lr_scheduler 'ReduceLROnPlateau': cannot be used: it needs
--model.lr_scheduler=OneCycleLR --model.lr_scheduler.max_lr=1 | model.lr_scheduler: You must define either total_steps
--model.lr_scheduler=Nope | model.lr_scheduler 'Nope': no such class
--model.engine.cache_gb=-1 | model.engine.cache_gb -1.0: must be finite and at least 0; 0 switches the cache off
--model.engine.cache_dir=/dev/null/x | model.engine.cache_dir '/dev/null/x': cannot be written
--model.engine.queries_at_once=0 | model.engine.queries_at_once 0
--model.engine.nope=1 | model.engine.nope: unknown option; model.engine has packed, paired
--model.engine.cache=1 | model.engine.cache: unknown option; did you mean model.engine.cache_gb?
--model.engine=3 | model.engine '3': a group of options takes no value; set its options with --model.engine.NAME VALUE
--checkpoint.monitor=x | checkpoint.monitor 'x': no such metric; choose one of val/loss, val/accuracy
--checkpoint.mode=x | checkpoint: `mode` can be min, max but got x
--checkpoint.save_top_k=-2 | checkpoint: Invalid value for save_top_k=-2
--checkpoint.filename=b{step | checkpoint.filename 'b{step': expected '}' before end of string
--checkpoint.filename={step:zz} | checkpoint.filename '{step:zz}': Unknown format code
--checkpoint.dirpath=rows.jsonl | rows.jsonl': is a file; give a folder
--checkpoint.every_n_epochs=-1 | checkpoint: Invalid value for every_n_epochs=-1
--checkpoint.every_n_train_steps=2 | checkpoint.every_n_train_steps: only validated states are saved; for others set last_checkpoint
--checkpoint.nope=1 | checkpoint.nope: unknown option; did you mean checkpoint.mode?
--checkpoint.train_time_interval=x | checkpoint.train_time_interval 'x': expected timedelta or null
--last_checkpoint.every_n_steps=0 | last_checkpoint.every_n_steps 0: must be at least 1
--last_checkpoint.every_minutes=-1 | last_checkpoint.every_minutes -1.0: must be 0 or more
--last_checkpoint.every_minutes=nan | last_checkpoint.every_minutes 'nan': expected a number
--guard.factor=1 | guard.factor 1.0: must be above 1, or auto, or null
--guard.factor=-2 | guard.factor -2.0: must be above 1
--guard.factor=.inf | guard.factor inf: must be above 1
--last_checkpoint.nope=1 | last_checkpoint.nope: unknown option; last_checkpoint has every_n_steps, every_minutes
--record.test_before=maybe | record.test_before 'maybe': expected true or false
--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=nope | EarlyStopping.monitor 'nope': no such metric
--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val/loss --trainer.callbacks.mode=x | trainer.callbacks: `mode` can be min, max, got x
--trainer.callbacks=EarlyStopping | trainer.callbacks: the chosen class needs monitor
--trainer.callbacks=ModelCheckpoint --trainer.callbacks.monitor=nope | ModelCheckpoint.monitor 'nope': no such metric
--trainer.callbacks=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.1 | trainer.callbacks StochasticWeightAveraging: does not work with slzo's steps; leave it out
--trainer.callbacks=EMAWeightAveraging | trainer.callbacks EMAWeightAveraging: does not work with slzo's steps; leave it out
--trainer.callbacks=BackboneFinetuning | trainer.callbacks BackboneFinetuning: does not work with slzo's steps; leave it out
--trainer.callbacks=LearningRateFinder | trainer.callbacks LearningRateFinder: does not work with slzo's steps; leave model.optimizer.lr at auto
--trainer.callbacks=BatchSizeFinder | trainer.callbacks BatchSizeFinder: does not work with slzo's steps
--data.tokenizer=x | data.tokenizer 'x'
--trainer.overfit_batches=1 | trainer.overfit_batches 1: each step draws other rows; leave it out
--trainer.plugins='[{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}]' | trainer.plugins AsyncCheckpointIO: a run renames and reads its checkpoints at once
--trainer.callbacks='[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}, {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]' | trainer: Found more than one stateful callback of type `EarlyStopping`
--trainer.callbacks='{"class_path": "ModelCheckpoint", "init_args": {"train_time_interval": "0:00:01"}}' | trainer.callbacks ModelCheckpoint.train_time_interval: would save nothing
--trainer.callbacks=Timer --trainer.callbacks.duration=x | trainer.callbacks: `Timer(duration='x')` is not a valid duration
--trainer.callbacks=nope.Nope | trainer.callbacks 'nope.Nope': nope cannot be imported
--trainer.callbacks=3 | trainer.callbacks '3': no such class
--trainer.devices=-3 | trainer: `devices` selected with `CPUAccelerator` should be an int > 0
--trainer.devices=0 | trainer: `Trainer(devices='0')` value is not a valid input
--trainer.devices=x | trainer: `devices` selected with `CPUAccelerator` should be
--trainer.devices=[0,0] | trainer: `devices` selected with `CPUAccelerator` should be
--trainer.devices=1000000 | trainer.devices 1000000: each device has a process of its own; give at most
--trainer.accelerator=tpu | trainer: Requirement 'torch_xla>=1.13' not met
--trainer.accelerator=nope | trainer: You selected an invalid accelerator name: `accelerator='nope'`
--trainer.strategy=dp | trainer: You selected an invalid strategy name: `strategy='dp'`
--trainer.strategy=fsdp | trainer.strategy 'fsdp': not supported, as its processes must run every layer equally often
--trainer.strategy=deepspeed_stage_3 | trainer.strategy 'deepspeed_stage_3': not supported, as its processes must run every layer equally often
--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy | not supported, as its processes must run every layer equally often
--trainer.strategy=ddp_notebook | trainer.strategy 'ddp_notebook': it copies this process
--trainer.num_nodes=0 | trainer: `num_nodes` must be a positive integer
--trainer.precision=16-mixed | trainer.precision '16-mixed': the masters of the tuned layer stay in float32
--trainer.gradient_clip_val=1 | trainer.gradient_clip_val 1: slzo does not clip gradients by their norm; leave it out
--trainer.accumulate_grad_batches=2 | trainer.accumulate_grad_batches 2: a forward-only step needs no accumulation
--trainer.precision=64 | trainer.precision 64: the masters of the tuned layer stay in float32
--trainer.logger=CometLogger | trainer.logger: Requirement 'comet-ml
--trainer.logger=Nope | trainer.logger 'Nope': no such class
--trainer.check_val_every_n_epoch=0 | trainer.check_val_every_n_epoch 0: must be at least 1
--trainer.check_val_every_n_epoch=-1 | trainer.check_val_every_n_epoch -1: must be at least 1
--trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=99 | trainer.val_check_interval 99: must be at most 5, the number of batches in an epoch
--trainer.val_check_interval=0 | trainer.val_check_interval 0: give the number of steps
--trainer.val_check_interval=-1 | trainer: You have passed invalid value -1 for val_check_interval
--trainer.val_check_interval=0.5 | trainer.val_check_interval 0.5: a fraction of an epoch needs trainer.check_val_every_n_epoch 1
--trainer.val_check_interval=x | trainer: Invalid time format for `val_check_interval`: 'x'
--trainer.limit_train_batches=0 | trainer.limit_train_batches 0: nothing would be trained
--trainer.limit_train_batches=0.0001 | trainer.limit_train_batches 0.0001: is less than one of the 5 batches
--trainer.limit_val_batches=1.5 | trainer: You have passed invalid value 1.5 for limit_val_batches
--trainer.max_steps=0 | trainer.max_steps 0: nothing would be trained
--trainer.max_steps=-1 | trainer.max_steps -1: nothing ends the run; give trainer.max_time or trainer.max_epochs
--trainer.max_time=00:00:00:05 --trainer.min_epochs=2 | trainer.min_epochs 2: trainer.max_time may leave time for fewer steps
--trainer.min_steps=99 | trainer.min_steps 99: is more than trainer.max_steps
--trainer.max_steps=-2 | trainer: `max_steps` must be a non-negative integer or -1
--trainer.max_epochs=0 | trainer.max_epochs 0: nothing would be trained
--trainer.max_time=x | trainer.max_time 'x': not a time; give DD:HH:MM:SS
--trainer.max_time.seconds=-5 | trainer.max_time {'seconds': -5}: must be longer than 0; give DD:HH:MM:SS
--trainer.max_time.seconds=0 | trainer.max_time {'seconds': 0}: must be longer than 0; give DD:HH:MM:SS
--trainer.log_every_n_steps=-1 | trainer.log_every_n_steps -1: must be at least 0
--trainer.fast_dev_run=-1 | trainer: fast_dev_run=-1 is not a valid configuration
--trainer.profiler=x | trainer: When passing string value for the `profiler`
--trainer.barebones=true | trainer.barebones: slzo's callbacks log and save; leave it out
--trainer.nope=1 | trainer.nope: unknown option
--trainer=3 | trainer '3': a group of options takes no value
--model=null | model 'null': a group of options takes no value
--seed_everything=x | seed_everything 'x': expected true or false or a whole number
--seed_everything=99999999999 | seed_everything 99999999999: give a number from 0 to 4294967295
--seed_everything=-1 | seed_everything -1: give a number from 0
--data.task=sst9 | data.task 'sst9': unknown task; choose one of
--data.task.class_path=slzo.Foo | data.task 'slzo.Foo': no such class; choose one of
--data.task= | data.task '': unknown task; choose one of boolq
--data.task=TemplateTask | data.task TemplateTask: needs data.task.prompt; slzo fit --data.task.help TemplateTask
TEMPLATE --data.task.prompt={a | data.task.prompt '{a': expected '}' before end of string
TEMPLATE --data.task.prompt={} | data.task.prompt '{}': {} is not a plain field name
TEMPLATE --data.task.prompt={sentence.__class__} | data.task.prompt '{sentence.__class__}': {sentence.__class__} is not a plain field name
TEMPLATE --data.task.prompt={sentence:>99999999999} | data.task.prompt '{sentence:>99999999999}': {sentence} is not a plain field name
TEMPLATE --data.task.prompt=x | data.task.prompt 'x': names no field of the row
TEMPLATE --data.task.prompt={nope} | rows.jsonl:1: field 'nope' is missing
TEMPLATE --data.task.prompt={sentence} --data.task.candidates=[x,x] | data.task.candidates ['x', 'x']: two candidates are equal
TEMPLATE --data.task.prompt={sentence} --data.task.candidates=[x] | data.task.candidates ['x']: give at least two answer texts
TEMPLATE --data.task.prompt={sentence} --data.task.candidates=[yes,no] | YAML reads yes, no, on and off without quotes as true or false
TEMPLATE --data.task.prompt={sentence} --data.task.labels=[1] | data.task.labels [1]: give 2 different labels
TEMPLATE --data.task.prompt={sentence} --data.task.labels=[a,b] | rows.jsonl:1: field 'label' is 0; it must be one of a, b
TEMPLATE --data.task.prompt={sentence} --data.task.label_field=nope | rows.jsonl:1: field 'nope' is missing
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=. | data.task.test_file '.': is a folder; give a file
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=nope.jsonl | data.task.test_file 'nope.jsonl': no such file
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=text.txt | text.txt: unknown kind of file
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=noise.parquet | noise.parquet: not a Parquet file
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=noise.csv | noise.csv:1: neither UTF-8 nor Windows-1252
TEMPLATE --data.task.prompt={sentence} --data.task.test_file=noise.jsonl | noise.jsonl:1: not valid UTF-8
--data.data_dir=text.txt | data.data_dir 'text.txt': is a file
--data.data_dir=nowhere | data.data_dir 'nowhere'
--model.optimizer=SGD --model.optimizer.lr=auto --data.batch_size=abc | data.batch_size 'abc': expected a whole number
--model.device_map='{"": disk}' --data.tokens_per_pass=abc | data.tokens_per_pass 'abc': expected a whole number
--data.batch_size=0 | data.batch_size 0
--data.data_dir=/proc | data.data_dir '/proc': the test split of task 'sst2' is missing
--data.num_train=-1 | data.num_train -1: must be at least 1
--data.num_test=0 | data.num_test 0: must be at least 1
--data.eval_batch_tokens=0 | data.eval_batch_tokens 0: must be at least 1
--data.num_demonstrations=999 | data.num_demonstrations 999: only 40 labelled training rows
--data.max_length=1 | data.max_length 1: the answer ' terrible' of example
--data.objective=x | data.objective 'x': no such class; choose one of AnswerF1
--data.objective=AnswerF1 | data.objective AnswerF1: no training row has an answer to compare with
--data.nope=1 | data.nope: unknown option
--profiler.rule=slzo.zo.selection.SelectionRule | profiler.rule 'slzo.zo.selection.SelectionRule': does not define select (docs
--profiler.rule=MaxRatioJmp | profiler.rule 'MaxRatioJmp': no such class; did you mean MaxRatioJump?
--profiler.rule=slzo.zo.estimators.SPSA | profiler.rule 'slzo.zo.estimators.SPSA': is not one of the expected classes; give one such as Auto
--profiler.rule=slzo.zo.scopes.Scope | profiler.rule 'slzo.zo.scopes.Scope': is not one of the expected classes
--model.estimator=OneSided --model.estimator.noise=x | model.estimator.noise: unknown option of the chosen class OneSided, which has none
--model.estimator=./own.Signs | model.estimator './own.Signs': no such class
--model.estimator.num_queries=2 | model.estimator.num_queries: unknown option of the chosen class SPSA, which has none; did you mean model.num_queries?
--profiler.rule=FirstOutlierLayer | profiler.rule: no layer has max > 100
--profiler.num_sequences=3 | profiler.num_sequences 3: must be at least 10; the average of fewer is not reliable
--profiler.text_file=no.txt | profiler.text_file 'no.txt': no such file
--profiler.text_file=few.txt | only 1 sequence of two tokens or more to profile, at least 10 are needed; give a file with more lines than 'few.txt'
--profiler.text_file=. | profiler.text_file '.': is a folder
--profiler.text_file=noise.csv | profiler.text_file 'noise.csv': not UTF-8
--ckpt_path=last | ckpt_path 'last': no run below 'runs'
--ckpt_path=nothing | ckpt_path 'nothing': no such file; give the folder of a run, a .ckpt file of its checkpoints, last or best
--ckpt_path=other.ckpt | ckpt_path 'other.ckpt': not a checkpoint written by slzo
--ckpt_path=. | ckpt_path '.': is a folder; give a .ckpt file
--ckpt_path=text.txt | ckpt_path 'text.txt': not a readable checkpoint
--ckpt_path=noise.csv | ckpt_path 'noise.csv': not a readable checkpoint
--config=nope.yaml | --config 'nope.yaml': no such file; check the path, or give one of slzo's own configs: chat, custom_task, json_reward, quickstart
--config=unknown.yaml | model.layr: unknown option; did you mean model.layer?
--config='{"model": {"layr": 3}}' | error: model.layr: unknown option; did you mean model.layer?
--config='model: {layr: 3}' | error: model.layr: unknown option; did you mean model.layer?
--config= | --config: is empty; give a YAML file
--config=. | --config '.': is a folder; give a YAML file
--config=noise.csv | --config 'noise.csv': not UTF-8 text
--config=empty.yaml | --config 'empty.yaml': holds no options
--config=text.txt | --config 'text.txt': holds a str instead of options
--config=list.yaml | --config 'list.yaml': holds a list instead of options
--config=null.yaml | --config 'null.yaml': model null: must contain options; add some below model
--config=twice.yaml | --config 'twice.yaml': not YAML (eps is given twice in the mapping from line 2 on)
--config=broken.yaml | --config 'broken.yaml': not YAML (while parsing a flow node
--config=endless.yaml | --config 'endless.yaml': not YAML (alias *a is inside its own anchor &a)
--config=bomb.yaml | --config 'bomb.yaml': not YAML (more than 30 aliases)
--config=code.yaml | --config 'code.yaml': not YAML (could not determine a constructor for the tag
--config=group.yaml | model.engine null: a group of options takes no value; leave model.engine out, or write its options below it
--config=rule.yaml | profiler []: a group of options takes no value
--config=outside.yaml | --config 'outside.yaml', line 2: rank: belongs below init_args, as in {class_path: LoRA, init_args: {rank: ...}}
--config=yes.yaml | --config 'yes.yaml', line 4: candidates: YAML reads yes, no, on, off, true and false without quotes
TEMPLATE --data.task.prompt={sentence} --data.task.name=../../esc | data.task.name '../../esc': result folders are named after it
TEMPLATE --data.task.prompt={sentence} --data.task.name=.. | data.task.name '..': result folders are named after it
TEMPLATE --data.task.prompt={sentence} --data.task.name= | data.task.name '': result folders are named after it
--checkpoint.filename=../../esc | checkpoint.filename '../../esc': leads out of its folder
--checkpoint.filename=/esc | checkpoint.filename '/esc': leads out of its folder
--trainer.logger.version=../../esc | trainer.logger.version '../../esc': leads out of its folder
--trainer.logger.name=../esc | trainer.logger.name '../esc': leads out of its folder
--nope | nope: unknown option
nope | unrecognized arguments: nope; write each value after its own option, as in --config A --config B
--model.eps | model.eps '': expected a number
"""
FILES = {
    "text.txt": "hello",
    "few.txt": "x\n" * 12 + "two tokens and more\n",
    "unknown.yaml": "model:\n  layr: 3\n",
    "empty.yaml": "",
    "list.yaml": "- 1\n- 2\n",
    "null.yaml": "model: null\n",
    "group.yaml": "model:\n  engine:\n  #  cache_gb: 0\n",
    "rule.yaml": "profiler: []\n",
    "outside.yaml": "model:\n  scope: {class_path: LoRA, rank: 4}\n",
    "twice.yaml": "model:\n  eps: 1\n  eps: 2\n",
    "broken.yaml": "model: {eps: [\n",
    "endless.yaml": "a: &a [*a]\n",
    "bomb.yaml": "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)).replace("*a0", "x"),
    "code.yaml": "model: !!python/object/apply:os.system [ls]\n",
    "yes.yaml": "data:\n  task:\n    class_path: slzo.tasks.template.TemplateTask\n    init_args: {candidates: [yes, no]}\n",
}
CASES = [tuple(line.split(" | ", 1)) for line in WRONG.strip().splitlines()]
_USUAL = 1  # cases of an option, by the last one that is given; more are exhaustive


def cases():
    """The cases as parameters of a test."""
    found, number = [], Counter()
    for arguments, expected in CASES:
        option = re.findall(r"--[\w.]+|$", arguments)[-2:][0]
        number[option] += 1
        marks = [] if number[option] <= _USUAL else [pytest.mark.exhaustive]
        found.append(pytest.param(arguments, expected, id=arguments, marks=marks))
    return found


def test_the_table_is_large():
    assert len({arguments for arguments, _ in CASES}) == len(CASES) >= 200


@pytest.fixture
def wrong_files(options):
    write_lines("rows.jsonl", [{"idx": i, "sentence": f"a film {i}", "label": i % 2} for i in range(60)])
    for name, text in FILES.items():
        Path(name).write_text(text)
    for ending in ("csv", "jsonl", "parquet"):
        Path(f"noise.{ending}").write_bytes(b"\xc5" + random.Random(0).randbytes(500))
    checkpoint_file.write({"state_dict": {}}, Path("other.ckpt"))
    return options


@pytest.mark.parametrize(("arguments", "expected"), cases())
def test_a_wrong_input_is_one_line(wrong_files, capsys, arguments, expected):
    line = error_line(capsys, "fit", *wrong_files, *shlex.split(arguments.replace("TEMPLATE", TEMPLATE)))
    assert expected in line
    assert not list(Path("runs").glob("*"))


# option, class, argument, value, and what the line says after them, in YAML and on the command line
ARGUMENTS = """
model.scope | LoRA | rank | abc | 'abc': expected a whole number; see --model.scope.help LoRA
model.scope | slzo.zo.scopes.LoRA | rnk | 3 | : unknown option of the chosen class LoRA, which has rank, alpha, target_modules, layers; did you mean rank?
model.scope | LoRA | layers | x | 'x': expected a list like [1, 2] or all or null; see --model.scope.help LoRA
model.scope | LoRA | target_modules | {a: 1} | {'a': 1}: expected a list of texts like ["a", "b"] or null; see --model.scope.help LoRA
model.scope | LayerScope | part | mpl | 'mpl': choose one of layer, attention, mlp; see --model.scope.help LayerScope
model.estimator | LOZO | rank | 1.5 | '1.5': expected a whole number; see --model.estimator.help LOZO
model.estimator | EvolutionStrategy | antithetic | some | 'some': expected true or false; see --model.estimator.help EvolutionStrategy
model.optimizer | torch.optim.SGD | momentum | abc | 'abc': expected a number; see --model.optimizer.help SGD
model.optimizer | SGD | momentm | 0.5 | : unknown option of the chosen class SGD, which has params, lr, momentum
model.lr_scheduler | StepLR | step_size | abc | 'abc': expected a whole number; see --model.lr_scheduler.help StepLR
profiler.rule | FirstOutlierLayer | max_abs | abc | 'abc': expected a number; see --profiler.rule.help FirstOutlierLayer
data.task | TemplateTask | labels | [null, 1] | [None, 1]: expected a list (each entry text or a whole number or a number) \
or null; see --data.task.help TemplateTask
data.task | TemplateTask | candidates | [1, 2] | [1, 2]: expected a list of texts like ["a", "b"] or null; see --data.task.help TemplateTask
data.task | TemplateTask | prompt | null | null: expected text; see --data.task.help TemplateTask
data.task | slzo.tasks.chat.ChatTask | turns | some | 'some': choose one of all, last; see --data.task.help ChatTask
data.objective | Reward | samples | x | 'x': expected a whole number or null; see --data.objective.help Reward
trainer.logger | slzo.lightning.loggers.RunLogger | save_dir | [1] | [1]: expected text; see --trainer.logger.help RunLogger
trainer.strategy | lightning.pytorch.strategies.DDPStrategy | start_method | x | 'x': choose one of popen, spawn, fork, forkserver; see --trainer.strategy.help DDPStrategy
trainer.callbacks | EarlyStopping | patience | abc | 'abc': expected a whole number; see --trainer.callbacks.help EarlyStopping
trainer.callbacks | lightning.pytorch.callbacks.EarlyStopping | nope | 1 | : unknown option of the chosen class EarlyStopping, which has monitor
"""
WRONG_ARGUMENTS = [tuple(line.split(" | ")) for line in ARGUMENTS.strip().splitlines()]


# one of each kind of value, and of each way to name a class
USUAL_ARGUMENTS = (
    "LoRA rank|slzo.zo.scopes.LoRA rnk|LoRA target_modules|LayerScope part|torch.optim.SGD momentum|TemplateTask prompt"
)
USUAL_ARGUMENTS += "|EvolutionStrategy antithetic|EarlyStopping patience|lightning.pytorch.callbacks.EarlyStopping nope"


def wrong_arguments():
    """The cases as parameters of a test."""
    names = [f"{kind} {argument}" for _, kind, argument, *_ in WRONG_ARGUMENTS]
    assert set(USUAL_ARGUMENTS.split("|")) <= set(names)
    for name, case in zip(names, WRONG_ARGUMENTS, strict=True):
        marks = [] if name in USUAL_ARGUMENTS.split("|") else [pytest.mark.slow]
        yield pytest.param(*case, id=" ".join(case[1:4]), marks=marks)


@pytest.mark.parametrize(("option", "kind", "argument", "value", "expected"), list(wrong_arguments()))
def test_a_wrong_argument_of_a_class_is_named(own_folder, capsys, option, kind, argument, value, expected):
    """A list names the place of the class too."""
    group, name = option.split(".")
    entry = f"class_path: {kind}, init_args: {{{argument}: {value}}}"
    is_list = name == "callbacks"
    Path("config.yaml").write_text(f"{group}: {{{name}: " + (f"[{{{entry}}}]" if is_list else f"{{{entry}}}") + "}")
    place = f"{option}.0" if is_list else option
    assert f"error: {place}.{argument}{'' if expected[0] == ':' else ' '}{expected}" in error_line(
        capsys, "fit", "--config=config.yaml"
    )
    line = error_line(capsys, "fit", f"--{option}{'+' if is_list else ''}={kind}", f"--{option}.{argument}={value}")
    assert f"error: {option}.{argument}{'' if expected[0] == ':' else ' '}{expected}" in line


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\n  eps: 1e-3\n  3: x\n", "line 3: YAML reads the name '3' as int"),
        (
            "model:\n  scope:\n    class_path: LoRA\n    init_args:\n      1.5: 4\n",
            "line 5: YAML reads the name '1.5' as float",
        ),
        ("on: {}\n", "line 1: YAML reads the name 'on' as bool"),
    ],
)
def test_a_name_that_is_a_number_is_found_in_the_file(own_folder, capsys, text, place):
    Path("config.yaml").write_text(text)
    assert f"--config 'config.yaml', {place}; give the name of an option" in error_line(
        capsys, "fit", "--config=config.yaml"
    )


@pytest.mark.parametrize(
    ("command", "option"), [("fit quickstart", "config quickstart"), ("test folder", "ckpt_path folder")]
)
def test_a_word_without_its_option_is_explained(own_folder, capsys, command, option):
    Path("folder").mkdir()
    line = error_line(capsys, *command.split())
    assert f"is not an option; write it as --OPTION VALUE, such as --{option}" in line


def test_a_time_without_quotes_is_explained(own_folder, capsys):
    Path("config.yaml").write_text("trainer:\n  max_time: 12:00:00:00\n")
    line = error_line(capsys, "fit", "--config=config.yaml")
    assert "trainer.max_time '2592000': expected text" in line
    assert "YAML reads a time such as 12:00:00:00 without quotes as a number, so put it in quotes" in line


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("replay", "run: is required; give --run VALUE: folder of the run"),
        ("export", "output: is required; give --output VALUE: folder to write"),
        ("generate", "ckpt_path: is required; give --ckpt_path VALUE: "),
        ("report", "runs: is required; give --runs VALUE: folders of the runs"),
    ],
)
def test_a_missing_option_is_named(capsys, command, expected):
    assert expected in error_line(capsys, command)


def test_a_config_that_can_be_read_only_once_is_refused(capsys):
    out, into = os.pipe()
    os.close(into)
    assert "is a pipe, whose content can be read only once" in error_line(capsys, "fit", f"--config=/dev/fd/{out}")
    os.close(out)


def test_a_current_folder_that_was_removed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert "the current folder was removed; go to another one" in error_line(capsys, "report", "runs/version_0")


def test_a_default_that_is_an_enum_is_read_as_its_value(options, capsys):
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options, *timer, "--print_config"])
    assert ended.value.code == 0
    assert "interval: step\n" in capsys.readouterr().out
    assert main(["fit", *options, *timer, "--trainer.max_steps=1"]) == 0


@pytest.mark.parametrize("option", ["model.optimizer", "model.lr_scheduler"])
def test_a_function_with_arguments_is_no_class(options, option, capsys, monkeypatch):
    Path("own_function.py").write_text("def make(params, lr: float = 0.1): ...\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "own_function", raising=False)
    group, name = option.split(".")
    Path("own.yaml").write_text(f"{group}: {{{name}: {{class_path: own_function.make, init_args: {{lr: 0.2}}}}}}")
    line = error_line(capsys, "fit", *options, "--config=own.yaml")
    assert f"{option} 'own_function.make': is a function; class_path takes a class, so give the path of one" in line


@pytest.mark.parametrize("logger", ["false", "[]"])
def test_without_a_logger_a_run_still_has_its_folder(options, logger):
    assert main(["fit", *options, f"--trainer.logger={logger}", "--trainer.max_steps=2"]) == 0
    files = {path.name for path in run_dir().iterdir()}
    assert {"checkpoints", "config.yaml", "outlier_profile.json", "summary.json"} <= files
    assert not any("metrics" in name or "events" in name for name in files)
    assert main(["test", "--ckpt_path=best"]) == 0


def test_another_layer_on_resume_is_refused(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.layer=1"]) == 0
    line = error_line(capsys, "fit", *options, "--ckpt_path=last", "--model.layer=2")
    assert "model.layer 2: the checkpoint tunes layer 1" in line
    assert main(["fit", *options, "--ckpt_path=last", "--model.layer=1", "--trainer.max_steps=3"]) == 0
    assert summary(1)["dominant_layer"] == 1


def test_a_function_that_does_not_say_what_it_returns_is_explained(own_folder, capsys, monkeypatch):
    Path("own_schedule.py").write_text("def make(optimizer): ...\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    line = error_line(capsys, "fit", "--config=quickstart", "--model.lr_scheduler=own_schedule.make")
    wanted = "is a function that does not say what it returns; annotate it with -> torch.optim.lr_scheduler.LRScheduler"
    assert f"model.lr_scheduler 'own_schedule.make': {wanted}" in line


def test_a_mistake_in_our_own_code_stays_a_traceback(options, monkeypatch):
    """It must not look like the user's."""
    monkeypatch.setattr(stepper, "_MAX_EPS", "a bug")
    with pytest.raises(TypeError, match="not supported between"):
        main(["fit", *options])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", r"train\.jsonl:3"),
        ('{"sentence": "x", "label": 7}', r"train\.jsonl:3.*7"),
        ('{"sentence": "x"}', r"train\.jsonl:3.*label"),
        ("[1]", r"train\.jsonl:3"),
        (None, r"\.jsonl.*(empty|no rows)"),
    ],
)
def test_a_broken_row_and_an_empty_file_are_named(options, data_dir, tmp_path, capsys, line, expected):
    folder = tmp_path / "broken" / "sst2"
    shutil.copytree(data_dir / "sst2", folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("" if line is None else "\n".join([*lines[:2], line, *lines[3:]]))
    assert re.search(expected, error_line(capsys, "fit", *options, f"--data.data_dir={folder.parent}"))


def test_rows_without_a_label_do_not_train(options, data_dir, tmp_path, capsys):
    rows = read_lines(data_dir / "sst2" / "train.jsonl")

    def without_labels(unlabeled):
        shutil.copytree(data_dir / "sst2", tmp_path / "rows" / "sst2", dirs_exist_ok=True)
        changed = [{**row, "label": -1} if unlabeled(row["idx"]) else row for row in rows]
        write_lines(tmp_path / "rows" / "sst2" / "train.jsonl", changed)
        return f"--data.data_dir={tmp_path / 'rows'}"

    line = error_line(capsys, "fit", *options, without_labels(lambda index: True))
    assert "no training row has a label" in line
    assert main(["fit", *options, without_labels(lambda index: index % 4 == 0), "--trainer.max_steps=5"]) == 0
    # once, although rows are encoded again if the model takes shorter sequences
    assert len(re.findall(r"Left out \d+ training rows without a label", capsys.readouterr().out)) == 1
    assert summary()["skipped_steps"] == 0


def test_models_that_cannot_be_split_are_refused(options, tmp_path, capsys):
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=320, **sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert "is not supported" in error_line(capsys, "fit", *options, f"--model.model={folder}")
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in error_line(capsys, "fit", *options, f"--model.model={folder}")


def test_divergence_stops_the_run_and_says_so(options, capsys):
    more = ["--guard.factor=null", "--model.optimizer.lr=1e38", "--model.max_nonfinite=2"]  # no rollback
    line = error_line(capsys, "fit", *options, *more)
    assert "training diverged" in line
    assert line.endswith("; lower the learning rate (model.optimizer.lr) or model.eps")  # SPSA in float32
