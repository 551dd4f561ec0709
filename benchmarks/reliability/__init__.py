"""What happens when something goes wrong, and does it last? The 25 faults, injected and counted; half an hour of everything at once."""
