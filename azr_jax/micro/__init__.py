"""The embedded model's world: a language of micro Python programs, the corpus made from it, and pretraining."""
