"""The report of a sweep: tables, figures and page, made from the files in its folder."""
