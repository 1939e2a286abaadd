"""How close every backend comes to the oracle, the NumPy backend. Each side computes in a process of its own.

`persuasion.txt` is the text that is read by default: the first 100 kB of chapters of Jane Austen's novel (1817), in the
public domain. It comes from Project Gutenberg's edition by way of the package `janeaustenr` 1.0.0; lines were joined to
paragraphs, and the title page was left out.
"""
