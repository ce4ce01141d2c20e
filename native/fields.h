// Fields of text and what they mean, every byte checked.

#pragma once

#include <array>
#include <cstdint>

namespace dlrm {

inline constexpr uint8_t kNoDigit = 0xFF;

inline constexpr std::array<uint8_t, 256> digit_values() {
  std::array<uint8_t, 256> values{};
  for (int byte = 0; byte < 256; ++byte) {
    values[byte] = byte >= '0' && byte <= '9'   ? byte - '0'
                   : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
                   : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                                : kNoDigit;
  }
  return values;
}

inline constexpr std::array<uint8_t, 256> kDigits = digit_values();

// The number of 8 hexadecimal digits; returns whether they are that.
inline bool parse_id(const uint8_t* text, uint32_t* value) {
  uint8_t bad = 0;
  *value = 0;
  for (int i = 0; i < 8; ++i) {
    const uint8_t digit = kDigits[text[i]];
    bad |= digit;
    *value = *value << 4 | digit;
  }
  return (bad & 0xF0) == 0;
}

// A position in text that ends with a newline, so that a field always has an end.
template <uint8_t kSeparator>
struct Cursor {
  const uint8_t* at;
  const uint8_t* end;

  bool ends_field() const { return *at == kSeparator || *at == '\n'; }

  bool take(uint8_t separator) { return *at == separator ? (++at, true) : false; }

  // 0 or 1.
  bool label(uint8_t* value) {
    *value = *at - '0';
    return *value <= 1 ? (++at, true) : false;
  }

  // An integer of 64 bits if it is negative, which becomes 0, else of 31; missing: 0.
  bool integer(int32_t* value, int64_t* missing) {
    *value = 0;
    if (ends_field()) {
      ++*missing;
      return true;
    }
    const bool negative = take('-');
    const uint64_t limit = negative ? uint64_t{1} << 63 : (uint64_t{1} << 31) - 1;
    const uint8_t* first = at;
    uint64_t magnitude = 0;
    for (uint8_t digit; (digit = *at - '0') <= 9; ++at) {
      if (magnitude > (limit - digit) / 10) return false;
      magnitude = magnitude * 10 + digit;
    }
    if (!negative) *value = static_cast<int32_t>(magnitude);
    return at != first;
  }

  // 8 hexadecimal digits; missing: 0.
  bool id(uint32_t* value) {
    *value = 0;
    if (ends_field()) return true;
    if (end - at < 9) return false;
    at += 8;
    return parse_id(at - 8, value);
  }
};

}  // namespace dlrm
