"""What ``benchmark.py`` is made of: what is compared, how a rank runs and measures it, and a file for each figure."""
