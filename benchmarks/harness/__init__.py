"""Machine, clock, memory and arithmetic that every measurement needs."""
