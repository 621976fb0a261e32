"""Pages for people: who will buy, search and leave, why, and how good the model is."""
