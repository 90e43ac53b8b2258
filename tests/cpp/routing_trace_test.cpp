#include "schedule/routing_trace.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "base/error.hpp"
#include "message_of.hpp"

namespace spmoe {
namespace {

using Experts = std::vector<std::uint16_t>;

/// Two passes over two layers.
RoutingTrace two_passes() {
  RoutingTrace trace{2, 4};
  trace.append(0, Experts{1, 3});
  trace.append(1, Experts{0});
  trace.append(0, Experts{3});
  trace.append(1, Experts{2, 0});
  return trace;
}

TEST(RoutingTrace, gives_the_accesses_to_come_in_order) {
  RoutingTrace trace = two_passes();
  EXPECT_EQ(trace.remaining(), 4u);
  EXPECT_TRUE(trace.advance(0, Experts{1, 3}));
  ASSERT_EQ(trace.remaining(), 3u);
  EXPECT_EQ(trace.upcoming(0).layer, 1);
  const auto last = trace.upcoming(2);
  EXPECT_EQ(last.layer, 1);
  EXPECT_EQ(Experts(last.experts.begin(), last.experts.end()), (Experts{2, 0}));
}

TEST(RoutingTrace, counts_the_needs_until_the_next_use) {
  RoutingTrace trace = two_passes();
  EXPECT_EQ(trace.next_use({0, 3}), 0u);
  EXPECT_EQ(trace.next_use({1, 0}), 1u);
  EXPECT_EQ(trace.next_use({1, 2}), 3u);
  EXPECT_EQ(trace.next_use({0, 0}), RoutingTrace::never);
  trace.advance(0, Experts{1, 3});
  EXPECT_EQ(trace.next_use({0, 1}), RoutingTrace::never);  // its last one is in flight
  EXPECT_EQ(trace.next_use({0, 3}), 1u);
  EXPECT_EQ(trace.next_use({1, 0}), 0u);
}

TEST(RoutingTrace, a_replay_that_leaves_the_trace_knows_nothing_more) {
  for (const Experts& other : {Experts{3}, Experts{3, 1}, Experts{}}) {
    RoutingTrace trace = two_passes();
    EXPECT_FALSE(trace.advance(0, other));
    EXPECT_EQ(trace.remaining(), 0u);
    EXPECT_EQ(trace.next_use({1, 0}), RoutingTrace::never);
    EXPECT_FALSE(trace.advance(0, Experts{1, 3}));  // there is no way back
  }
  RoutingTrace trace = two_passes();
  EXPECT_FALSE(trace.advance(1, Experts{1, 3}));  // of another layer
}

TEST(RoutingTrace, ends_with_its_last_need) {
  RoutingTrace trace{1, 2};
  trace.append(0, Experts{0});
  EXPECT_TRUE(trace.advance(0, Experts{0}));
  EXPECT_EQ(trace.remaining(), 0u);
  EXPECT_EQ(trace.next_use({0, 0}), RoutingTrace::never);
  EXPECT_FALSE(trace.advance(0, Experts{0}));
}

TEST(RoutingTrace, starts_again_when_it_is_rewound) {
  RoutingTrace trace = two_passes();
  trace.advance(0, Experts{1, 3});
  trace.advance(1, Experts{3});  // leaves it
  trace.rewind();
  EXPECT_EQ(trace.remaining(), 4u);
  EXPECT_EQ(trace.next_use({0, 3}), 0u);
  EXPECT_TRUE(trace.advance(0, Experts{1, 3}));
  EXPECT_TRUE(trace.advance(1, Experts{0}));
}

TEST(RoutingTrace, an_expert_that_the_model_has_not_got_is_refused_unchanged) {
  RoutingTrace trace{2, 4};
  EXPECT_EQ(message_of<InvalidArgument>([&] { trace.append(0, Experts{1, 4}); }),
            "the trace names expert 4 of layer 0, but there are 2 layers of 4 experts");
  EXPECT_EQ(message_of<InvalidArgument>([&] { trace.append(2, Experts{1}); }),
            "the trace names expert 1 of layer 2, but there are 2 layers of 4 experts");
  EXPECT_EQ(trace.remaining(), 0u);
}

}  // namespace
}  // namespace spmoe
