"""Small applications that embed edgelm as a stranger's would: through its public names only.

Each is a script of its own, to be read and copied; `docs/embedding.md` explains them. They are not in the wheel.
"""
