"""Other libraries' models and files: each module imports its library when it is used."""
