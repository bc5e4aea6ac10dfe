"""Samples of a task: from files of text, chats, images or ready inputs to batches that a model takes."""
