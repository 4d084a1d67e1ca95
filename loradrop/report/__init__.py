"""What a run came to: tables for a terminal, pictures, a page."""
