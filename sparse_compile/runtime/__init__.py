"""The KV runtime: who holds which page of KV, and what is copied when."""
