"""The spool: files in which kept events survive the end of their process."""
