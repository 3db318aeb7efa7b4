"""The report of a sweep, made from the files in its folder."""
