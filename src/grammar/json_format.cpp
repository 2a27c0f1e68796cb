#include "grammar/json_format.h"

#include <fmt/format.h>

namespace latente::grammar {

const std::map<std::string, std::string, std::less<>>& string_formats() {
  static const auto all = [] {
    const std::string year = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)";  // not 0000
    const std::string leap =
        "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)";
    const std::string date =
        "(?:" + year +
        "-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
        "|02-(?:0[1-9]|1[0-9]|2[0-8]))|" +
        leap + "-02-29)";
    const std::string zone = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
    const std::string time = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?" + zone;
    const std::string byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
    const std::string label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?";
    const std::string piece = "[0-9a-fA-F]{1,4}", pieces = "(?:" + piece + ":)";
    const std::string last = "(?:" + piece + ":" + piece + "|" + byte + "(?:\\." + byte + "){3})";
    // RFC 3986: :: stands for as many pieces as are missing.
    std::string ipv6 = "^(?:" + pieces + "{6}" + last + "|::" + pieces + "{5}" + last;
    for (int left = 4; left >= 0; --left) {
      ipv6 += fmt::format("|(?:{0}{{0,{1}}}{2})?::{0}{{{3}}}{4}", pieces, 4 - left, piece, left, last);
    }
    ipv6 += fmt::format("|(?:{0}{{0,5}}{1})?::{1}|(?:{0}{{0,6}}{1})?::)$", pieces, piece);
    // Short enough together for the 253 characters a name may have.
    const std::string short_label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?";
    const std::string name = short_label + "(?:\\." + short_label + "){0,7}";
    const std::string count = "(?:0|[1-9][0-9]{0,5})";
    const std::string seconds = count + "S", minutes = count + "M(?:" + seconds + ")?";
    const std::string hours = "T(?:" + count + "H(?:" + minutes + ")?|" + minutes + "|" + seconds + ")";
    const std::string days = count + "D", months = count + "M(?:" + days + ")?";
    const std::string years = "(?:" + count + "Y(?:" + months + ")?|" + months + "|" + days + ")";
    const std::string in_path = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})";
    const std::string path = "(?:/" + in_path + "*)*", in_query = "(?:" + in_path + "|[/?])*";
    return std::map<std::string, std::string, std::less<>>{
        {"date", "^" + date + "$"},
        {"time", "^" + time + "$"},
        {"date-time", "^" + date + "T" + time + "$"},
        {"uuid", "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"},
        {"duration", "^P(?:" + years + "(?:" + hours + ")?|" + hours + "|" + count + "W)$"},
        {"hostname", "^" + name + "$"},
        {"ipv6", ipv6},
        {"uri", "^[A-Za-z][A-Za-z0-9+.-]{0,15}:(?://" + name + "(?::[0-9]{1,5})?" + path + "|" + in_path +
                    "+" + path + ")(?:\\?" + in_query + ")?(?:#" + in_query + ")?$"},
        {"ipv4", "^" + byte + "(?:\\." + byte + "){3}$"},
        {"email", "^[A-Za-z0-9_+-]+(?:\\.[A-Za-z0-9_+-]+)*@" + label + "(?:\\." + label + ")+$"}};
  }();
  return all;
}

}  // namespace latente::grammar
