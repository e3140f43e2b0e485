"""A zoo of tiny models that nobody rewrote for us, and the truth about their attention."""
