"""Sessions of the runtime's Postgres database, read without changing anything. psycopg is imported when it is used."""
