// Numbers and tables for people.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace comfytp::cli {

/// "50.2 %".
std::string percent_text(double part, double whole);
/// "3.21 s", "12.3 ms".
std::string seconds_text(double seconds);
/// "1,234,567"; not negative.
std::string count_text(std::int64_t count);

/// Prints rows on stdout with aligned columns: the first to the left, the others to the right.
void print_table(const std::vector<std::vector<std::string>>& rows);

}  // namespace comfytp::cli
