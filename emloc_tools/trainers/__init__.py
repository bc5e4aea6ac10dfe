"""Configurations and scripts by which other people's trainers train a LoRA on an emulator; one file per trainer."""
