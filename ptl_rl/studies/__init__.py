"""Studies: a question, the runs that answer it, and the table, figure and paragraph that come of them."""
