"""What a run leaves behind for people: the run folder, metrics and their glossary, progress, report, oversight."""
