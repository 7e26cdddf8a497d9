"""How a recipe runs, whatever it trains: its options and places, its processes, the loop, and what it leaves behind."""
