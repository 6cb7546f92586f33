"""What a popular account says of DeepSeek-V3 and R1, claim by claim: re-made, computed, audited, or refused."""
