"""What a run came to, for people: Markdown tables, an HTML page, a comparison, a receipt."""
