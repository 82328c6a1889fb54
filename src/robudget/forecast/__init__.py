"""What a recipe will cost before it runs, on a device of a table or on this machine."""
