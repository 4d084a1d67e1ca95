"""The command `loradrop`: what its words do, on models, data and adapters that it finds itself."""
