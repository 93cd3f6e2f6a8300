"""The page that ``report.py`` writes: what it reads, its charts, its tables."""
