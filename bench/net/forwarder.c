/* Forwards IP packets between TUN devices as links of given delay, rate, jitter and loss would.
 *
 *     forwarder FD...          FD i is the TUN of the device with address 10.0.0.(i + 1)
 *
 * Orders on standard input, one a line, each answered by one line:
 *     links M  {delay_ns jitter_ns ns_per_byte loss reorder flip replay} x M  {first second} x N x N
 *         N x N routes, by source and target: the links a packet crosses, -1 for none
 *     stats    packets bytes dropped late_p50_ns late_p99_ns late_max_ns since the last time
 * It ends with its input.
 *
 * A link sends one packet after another (ns_per_byte), then takes its delay. A second link begins
 * to send when the packet's first bit arrives, as packets of wire size would do it: a large
 * segment costs its serialization once, not once per link. bench/net/forwarder.py does the same
 * in Python, slower.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
    DEVICES = 64,
    LINKS = 2 * DEVICES + DEVICES * DEVICES,
    HEADER = 10,           /* struct virtio_net_hdr */
    ETHERNET = 14,         /* what a packet carries beside itself on a wire */
    QUEUE_BYTES = 1500000, /* what waits for one link at most, as 1000 full packets */
    LATEST_US = 10000,     /* of the histogram of lateness */
    BATCH = 64,            /* packets taken from one device before the others have their turn */
    OUTLIER_NS = 100000,   /* of waking: says nothing about the next time */
};
typedef int64_t ns;

struct link {
    double delay, jitter, ns_per_byte, loss, flip, replay;
    int reorder;
    ns free_at; /* when it has sent everything given to it */
    int kept;   /* bytes of a packet to be replayed */
    unsigned char *earlier;
};
struct packet {
    ns due;         /* when something is to be done with it */
    ns last_bit;    /* when its last bit is at the router */
    uint64_t order; /* equal times: first come, first served */
    int second;     /* the link it still has to cross, or -1 */
    int reorder;    /* it may overtake others between the same two devices */
    int source, target, length, wire_bytes;
    unsigned char bytes[];
};
struct heap {
    struct packet **at;
    int count, room;
    ns last[DEVICES][DEVICES]; /* the latest from and to each device */
};

static struct link links[LINKS];
static int routes[DEVICES][DEVICES][2], devices, fds[DEVICES];
static struct heap arrivals, deliveries; /* first bits at the router; last bits at the target */
static double least_second_delay;
static ns oversleep = 20000; /* how late the system wakes us, learned */
static uint64_t order, packets, bytes, dropped, late[LATEST_US];
static ns latest;

static ns now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int before(const struct packet *a, const struct packet *b) {
    return a->due != b->due ? a->due < b->due : a->order < b->order;
}

static void push(struct heap *heap, struct packet *packet) {
    if (heap->count == heap->room) {
        heap->room = heap->room ? 2 * heap->room : 256;
        heap->at = realloc(heap->at, heap->room * sizeof *heap->at);
        if (!heap->at) abort();
    }
    int i = heap->count++;
    for (; i && before(packet, heap->at[(i - 1) / 2]); i = (i - 1) / 2)
        heap->at[i] = heap->at[(i - 1) / 2];
    heap->at[i] = packet;
}

static struct packet *pop(struct heap *heap) {
    struct packet *top = heap->at[0], *moved = heap->at[--heap->count];
    int i = 0;
    for (int child; (child = 2 * i + 1) < heap->count; i = child) {
        if (child + 1 < heap->count && before(heap->at[child + 1], heap->at[child])) child++;
        if (!before(heap->at[child], moved)) break;
        heap->at[i] = heap->at[child];
    }
    heap->at[i] = moved;
    return top;
}

/* Flip a bit of what a TCP packet carries, or put there what an earlier one carried. The sender's
 * system leaves the checksum to us, so the receiver's does not look at it. */
static void tamper(struct link *link, struct packet *packet) {
    unsigned char *ip = packet->bytes + HEADER, *tcp = ip + 4 * (ip[0] & 15);
    if (ip[9] != IPPROTO_TCP || tcp + 20 > packet->bytes + packet->length) return;
    unsigned char *data = tcp + 4 * (tcp[12] >> 4);
    int size = (int)(packet->bytes + packet->length - data);
    if (size <= 0) return;
    if (drand48() < link->flip) data[(int)(drand48() * size)] ^= 1 << (int)(drand48() * 8);
    if (!link->earlier && !(link->earlier = malloc(1 << 16))) abort();
    if (link->kept && drand48() < link->replay) {
        memcpy(data, link->earlier, size < link->kept ? size : link->kept);
    } else {
        memcpy(link->earlier, data, size);
        link->kept = size;
    }
}

/* Send a packet whose first bit is there at `first` and whose last bit at `last`; 0: it is lost.
 * Changes both to the times at the link's other end. */
static int cross(struct link *link, struct packet *packet, ns *first, ns *last) {
    int wire_bytes = packet->wire_bytes;
    ns start = *first > link->free_at ? *first : link->free_at;
    if ((start - *first) > QUEUE_BYTES * link->ns_per_byte && link->ns_per_byte > 0) return 0;
    if (link->loss > 0 && drand48() < link->loss) return 0;
    if (link->flip > 0 || link->replay > 0) tamper(link, packet);
    link->free_at = start + (ns)(wire_bytes * link->ns_per_byte);
    ns delay = (ns)(link->delay + link->jitter * (2 * drand48() - 1));
    ns end = *last > link->free_at ? *last : link->free_at;
    *first = start + delay;
    *last = end + delay;
    return 1;
}

/* Have something done with a packet at `due`, and not before what its source sent there before. */
static void schedule(struct packet *packet, ns due, struct heap *heap) {
    ns *last = &heap->last[packet->source][packet->target];
    packet->due = packet->reorder || due > *last ? due : *last;
    *last = packet->due;
    push(heap, packet);
}

static void drop(struct packet *packet) {
    dropped++;
    free(packet);
}

static void arrive(struct packet *packet) {
    ns first = packet->due, last = packet->last_bit;
    if (!cross(&links[packet->second], packet, &first, &last)) {
        drop(packet);
        return;
    }
    schedule(packet, last, &deliveries);
}

static void deliver(struct packet *packet) {
    ns lateness = now() - packet->due;
    if (write(fds[packet->target], packet->bytes, packet->length) < 0) {
        drop(packet);
        return;
    }
    if (lateness > latest) latest = lateness;
    late[lateness / 1000 < LATEST_US ? lateness / 1000 : LATEST_US - 1]++;
    packets++;
    bytes += packet->wire_bytes;
    free(packet);
}

static void run_due(void) {
    for (;;) {
        ns t = now();
        if (arrivals.count && arrivals.at[0]->due <= t)
            arrive(pop(&arrivals));
        else if (deliveries.count && deliveries.at[0]->due <= t)
            deliver(pop(&deliveries));
        else
            return;
    }
}

static int wire_bytes(const unsigned char *buffer, int length) {
    uint16_t header, segment; /* of a segment that is still whole: TCP/IP header, payload a packet */
    memcpy(&header, buffer + 2, 2);
    memcpy(&segment, buffer + 4, 2);
    int whole = length - HEADER;
    int count = buffer[1] && segment && whole > header ? (whole - header + segment - 1) / segment : 1;
    return whole + (count - 1) * header + count * ETHERNET;
}

static void take(int source, ns waking) {
    static unsigned char buffer[HEADER + 65536];
    for (int taken = 0, length; taken < BATCH; taken++, run_due()) {
        if ((length = read(fds[source], buffer, sizeof buffer)) <= 0) return;
        const unsigned char *ip = buffer + HEADER;
        if (length < HEADER + 20 || ip[0] >> 4 != 4) continue;
        int target = ip[19] - 1;
        if (ip[16] != 10 || ip[17] || ip[18] || target < 0 || target >= devices) continue;
        int first_link = routes[source][target][0];
        if (first_link < 0) {
            dropped++;
            continue;
        }
        struct packet *packet = malloc(sizeof *packet + length);
        if (!packet) abort();
        memcpy(packet->bytes, buffer, length);
        packet->length = length;
        packet->wire_bytes = wire_bytes(buffer, length);
        packet->source = source;
        packet->target = target;
        packet->second = routes[source][target][1];
        packet->reorder =
            links[first_link].reorder || (packet->second >= 0 && links[packet->second].reorder);
        packet->order = order++;
        ns first = now() - waking, last = first;
        if (!cross(&links[first_link], packet, &first, &last)) {
            drop(packet);
        } else if (packet->second < 0) {
            schedule(packet, last, &deliveries);
        } else {
            schedule(packet, first, &arrivals);
            packet->last_bit = last + packet->due - first;
        }
    }
}

static void set_links(char *text) {
    int count = (int)strtol(text, &text, 10);
    if (count < 0 || count > LINKS) exit(2);
    for (struct link *link = links; link < links + count; link++) {
        link->delay = strtod(text, &text);
        link->jitter = strtod(text, &text);
        link->ns_per_byte = strtod(text, &text);
        link->loss = strtod(text, &text);
        link->reorder = (int)strtol(text, &text, 10);
        link->flip = strtod(text, &text);
        link->replay = strtod(text, &text);
        link->free_at = 0;
        link->kept = 0;
    }
    least_second_delay = INFINITY;
    memset(arrivals.last, 0, sizeof arrivals.last);
    memset(deliveries.last, 0, sizeof deliveries.last);
    for (int i = 0; i < devices; i++)
        for (int j = 0; j < devices; j++)
            for (int k = 0; k < 2; k++) {
                int at = (int)strtol(text, &text, 10);
                if (at >= count) exit(2);
                routes[i][j][k] = at;
                if (k && at >= 0)
                    least_second_delay = fmin(least_second_delay, links[at].delay - links[at].jitter);
            }
    puts("ok");
}

static void tell_stats(void) {
    uint64_t seen = 0, p50 = 0, p99 = 0;
    for (int us = 0; us < LATEST_US; us++) {
        seen += late[us];
        if (2 * seen <= packets) p50 = us + 1;
        if (100 * seen <= 99 * packets) p99 = us + 1;
    }
    printf("%llu %llu %llu %llu %llu %lld\n", (unsigned long long)packets,
           (unsigned long long)bytes, (unsigned long long)dropped, (unsigned long long)p50 * 1000,
           (unsigned long long)p99 * 1000, (long long)latest);
    packets = bytes = dropped = 0;
    latest = 0;
    memset(late, 0, sizeof late);
}

static void obey(void) {
    static char *line;
    static size_t room;
    if (getline(&line, &room, stdin) < 0) exit(0);
    if (!strncmp(line, "links ", 6))
        set_links(line + 6);
    else
        tell_stats();
    fflush(stdout);
}

/* When something has to be done next. An arrival by itself can wait: nothing is seen of it before
 * it has crossed its second link too. */
static ns next_due(void) {
    ns due = INT64_MAX;
    if (deliveries.count) due = deliveries.at[0]->due;
    if (arrivals.count) {
        ns seen = arrivals.at[0]->due + (ns)least_second_delay;
        if (seen < due) due = seen;
    }
    return due;
}

int main(int count, char **arguments) {
    if (count < 2 || count > DEVICES + 1) return 2;
    devices = count - 1;
    struct pollfd polled[DEVICES + 1];
    for (int i = 0; i < devices; i++) {
        fds[i] = atoi(arguments[i + 1]);
        polled[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    }
    polled[devices] = (struct pollfd){.fd = 0, .events = POLLIN};
    setvbuf(stdin, NULL, _IONBF, 0);
    memset(routes, -1, sizeof routes);
    /* Before whatever else computes on this machine, where that is allowed; exact sleeps else. */
    struct sched_param priority = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO, &priority);
    prctl(PR_SET_TIMERSLACK, 1UL);
    for (;;) {
        ns due = next_due(), left = due == INT64_MAX ? due : due - oversleep - now(), waking = 0;
        if (left < 0) left = 0; /* too short for a sleep: look again and again */
        struct timespec timeout = {left / 1000000000LL, left % 1000000000LL};
        int ready = ppoll(polled, count, due == INT64_MAX ? NULL : &timeout, NULL);
        if (left > 0 && ready > 0) waking = oversleep; /* something came while we slept */
        if (left > 0 && ready == 0) {
            ns late_by = now() - due;
            oversleep += (late_by < OUTLIER_NS ? late_by : OUTLIER_NS) / 16;
        }
        run_due();
        if (ready > 0) {
            for (int i = 0; i < devices; i++)
                if (polled[i].revents & POLLIN) take(i, waking);
            if (polled[devices].revents) obey();
        }
    }
}
