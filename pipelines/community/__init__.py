"""Folders of diffusers made of a trained stage: its steps as a table, what goes into the folder, and the model card.

The ``.j2`` files beside the modules are what is written into such a folder; nothing in them imports this package.
"""
