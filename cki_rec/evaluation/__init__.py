"""Arrays and records in; numbers, tables and figures out."""
