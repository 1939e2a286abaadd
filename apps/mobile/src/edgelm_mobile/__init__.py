"""A demo for phones and desktops: one screen to talk with a model, made with Toga, packaged by Briefcase."""
