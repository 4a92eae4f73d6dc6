"""What must survive: SQL, PostgreSQL, segments. Importing the package alone imports no driver."""
