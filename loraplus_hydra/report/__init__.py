"""The report of a sweep, made from the files in the sweep's folder."""
