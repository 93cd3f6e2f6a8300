"""The page that ``tools/report.py`` writes: what it reads, its charts, its tables."""
