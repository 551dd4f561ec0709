"""fastcm: consistency models, one network call per image."""
