"""Makes, measures, plans and resumes a training; :mod:`slzo.fit` calls it in order."""
