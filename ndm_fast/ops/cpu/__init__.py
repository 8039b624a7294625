"""The ops in C++ on the CPU."""
