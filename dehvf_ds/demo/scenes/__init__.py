"""The small world of shapes that ``make_scenes.py`` writes: its content, its pictures, its questions."""
