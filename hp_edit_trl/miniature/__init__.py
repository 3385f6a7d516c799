"""Floor 3: small stand-ins for the real models, built on the spot. Nothing in the rest of the library knows them."""
