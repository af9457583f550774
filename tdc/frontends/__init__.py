"""The doors: each frontend finds sites in its kind of model, runs it with taps, and cuts the replacements in."""
