"""What the docs say in numbers: results/ in, the tables between marks in README.md and docs/ out. Measures nothing."""
