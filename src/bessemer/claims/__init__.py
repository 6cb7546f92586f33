"""What a popular account says of DeepSeek-V3 and R1, claim by claim: reproduced, computed, audited, or refused."""
