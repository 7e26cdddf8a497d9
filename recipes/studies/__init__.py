"""What ``delay_study.py`` and ``compare_runs.py`` are made of: settings of runs, one run, and what many runs come to."""
