"""The sections of the page, a file each: its words, its tables and its figures."""
