"""loradrop inside other libraries. Importing a module here imports the library that it is for."""
