/* A load generator: one thread, one epoll, HTTP/1.1 POSTs of one body over kept connections.
 *
 *   load closed  --target T -c N --seconds S [--rate R]        requests: latency, requests a second
 *   load streams --target T -c N --chunks K --rate R [--ramp S] [--seconds S --loop]
 *                                                              event streams: first byte, age of each event on arrival
 *   load hold    --target T -c N --seconds S                   send a request on each connection, wait, say how many answered
 * T is HOST:PORT (an IPv4 address) or the path of a Unix socket. Common: --path P, --body TEXT or --body-file F (- is standard input),
 * --header LINE (may be repeated), --warmup S. Prints one JSON object.
 *
 * `closed`: each connection sends its next request when it has the last answer; with --rate R requests a second are due in
 * all, evenly, and latency counts from when one was due, so a server that stalls is charged for all it kept waiting.
 * `streams`: -c streams, begun evenly over --ramp seconds. Events are those of mock_backend.c: 275 bytes, with the time
 * they were made in them. With --loop a stream that ends is begun anew until --seconds are over.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { EVENT_BYTES = 275, STAMP_AT = 15, STAMP_LENGTH = 20, READ = 262144, HEAD = 32768, READS_A_TURN = 4 };

typedef struct { uint32_t *at; size_t length, room; } samples; /* in units of 100 ns */

typedef struct {
    int fd, out; /* out: EPOLLOUT is watched */
    int busy, connected;
    size_t sent;
    char *head;
    size_t head_len;
    int in_body, status, close_after;
    int64_t left;   /* of the body, or of the chunk at hand; -1: until the end of the connection */
    int chunked, chunk_state;
    int64_t chunk_size;
    int64_t started, due, body_at;
    int64_t stamp;
    int failed;
} conn;

static int epfd, timer_fd;
static conn *conns;
static int count = 1, streams, hold, looped;
static double seconds = 2, warmup, rate, ramp;
static long chunks = 0;
static char *request;
static size_t request_len;
static struct sockaddr_storage address;
static socklen_t address_len;
static int tcp;

static samples latency, first, delay;
static long requests, errors, unread, statuses[600], events_seen, completed, reconnects;
static int64_t bytes, measure_from, measure_to, stop_at;
static char error_sample[200];

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sample(samples *s, int64_t ns) {
    if (s->length == s->room) s->at = realloc(s->at, (s->room = s->room ? 2 * s->room : 65536) * sizeof *s->at);
    s->at[s->length++] = ns < 0 ? 0 : (uint32_t)(ns / 100);
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void print_samples(const char *name, samples *s) {
    qsort(s->at, s->length, sizeof *s->at, by_size);
    if (!s->length) { printf(",\"%s\":null", name); return; }
#define AT(q) ((double)s->at[(size_t)((double)(s->length - 1) * (q))] / 10)
    printf(",\"%s\":{\"count\":%zu,\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f}", name, s->length, AT(.5), AT(.9), AT(.99), AT(.999), AT(1));
}

static void fail(const char *what) {
    errors++;
    if (!*error_sample) snprintf(error_sample, sizeof error_sample, "%s", what);
}

static void begin(conn *c);

static void open_conn(conn *c) {
    int one = 1;
    c->fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) { perror("socket"); exit(1); }
    if (tcp) setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int result;
    while ((result = connect(c->fd, (void *)&address, address_len)) && errno == EAGAIN) usleep(1000);
    if (result && errno != EINPROGRESS) { perror("connect"); exit(1); }
    c->connected = !result;
    c->out = 1;
    c->in_body = c->head_len = 0;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &e);
}

static void watch_out(conn *c, int out) {
    if (c->out == out) return;
    struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &e);
    c->out = out;
}

/* The answer is over, well or not: what next. */
static void next(conn *c, int reopen) {
    c->busy = 0;
    if (reopen) {
        close(c->fd);
        reconnects++;
        open_conn(c);
    }
    int64_t now = now_ns();
    if (hold || now >= stop_at) return;
    if (streams && !looped) return;
    if (rate > 0 && !streams) {
        c->due += (int64_t)(1e9 * count / rate);
        if (c->due > now) return; /* the timer begins it */
        begin(c);
        c->started = c->due;
        return;
    }
    begin(c);
}

static void lost(conn *c, const char *why) {
    if (c->busy) fail(why);
    next(c, 1);
}

static void push(conn *c) {
    while (c->sent < request_len) {
        ssize_t n = send(c->fd, request + c->sent, request_len - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) { watch_out(c, 1); return; }
            lost(c, strerror(errno));
            return;
        }
        c->sent += (size_t)n;
    }
    watch_out(c, 0);
}

static void begin(conn *c) {
    c->busy = 1;
    c->sent = c->head_len = 0;
    c->in_body = c->failed = 0;
    c->body_at = 0;
    c->started = now_ns();
    if (c->connected) push(c);
}

static void done(conn *c) {
    int64_t now = now_ns();
    if (c->status != 200) fail(c->head);
    if (c->status > 0 && c->status < 600) statuses[c->status]++;
    requests += now >= measure_from && now <= measure_to;
    if (now >= measure_from && now <= measure_to && c->status == 200 && !streams) sample(&latency, now - c->started);
    if (streams && c->status == 200) completed++;
    next(c, c->close_after);
}

/* Some bytes of a body, without framing. */
static void body(conn *c, const char *p, int64_t length, int64_t now) {
    if (!c->body_at && length) {
        if (streams && now <= measure_to) sample(&first, now - c->started);
    }
    bytes += length;
    if (!streams || c->status != 200) { c->body_at += length; return; }
    int64_t position = c->body_at, end = position + length;
    c->body_at = end;
    int measured = now >= measure_from && now <= measure_to;
    if (rate > 0) {
        while (position < end) {
            int64_t in_event = position % EVENT_BYTES;
            if (in_event < STAMP_AT) { int64_t skip = STAMP_AT - in_event; position += skip; p += skip; continue; }
            if (in_event >= STAMP_AT + STAMP_LENGTH) { int64_t skip = EVENT_BYTES - in_event; position += skip; p += skip; continue; }
            if (in_event == STAMP_AT) c->stamp = 0;
            c->stamp = c->stamp * 10 + (*p - '0');
            if (in_event == STAMP_AT + STAMP_LENGTH - 1 && measured) sample(&delay, now - c->stamp);
            position++;
            p++;
        }
    }
    if (measured) {
        events_seen += (long)(end / EVENT_BYTES - (end - length) / EVENT_BYTES);
    }
}

static int head_done(conn *c) {
    c->head[c->head_len] = 0;
    c->status = atoi(c->head + 9);
    c->close_after = strcasestr(c->head, "\r\nconnection: close") != NULL;
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
    c->left = c->chunked ? 0 : length ? strtol(length + 17, NULL, 10) : -1;
    c->chunk_state = 0;
    c->chunk_size = 0;
    c->in_body = 1;
    return !c->chunked && c->left == 0;
}

/* 0: this connection has a new life or none, forget the rest of what was read. */
static int feed(conn *c, const char *p, size_t n, int64_t now) {
    while (n) {
        if (!c->busy) { fail("bytes without a request"); lost(c, ""); return 0; }
        if (!c->in_body) {
            size_t take = n < HEAD - c->head_len - 1 ? n : HEAD - c->head_len - 1;
            size_t from = c->head_len > 3 ? c->head_len - 3 : 0;
            memcpy(c->head + c->head_len, p, take);
            char *end = memmem(c->head + from, c->head_len + take - from, "\r\n\r\n", 4);
            if (!end) {
                c->head_len += take;
                if (take < n) { fail("head too long"); next(c, 1); return 0; }
                return 1;
            }
            size_t used = (size_t)(end + 4 - c->head) - c->head_len;
            c->head_len += used;
            p += used;
            n -= used;
            if (head_done(c)) { done(c); if (c->close_after) return 0; }
            continue;
        }
        if (!c->chunked) {
            int64_t take = c->left < 0 || (int64_t)n < c->left ? (int64_t)n : c->left;
            body(c, p, take, now);
            p += take;
            n -= (size_t)take;
            if (c->left > 0 && !(c->left -= take)) { int closes = c->close_after; done(c); if (closes) return 0; }
            continue;
        }
        switch (c->chunk_state) {
        case 0: /* the size */
            if (*p == '\n') c->chunk_state = c->chunk_size ? 1 : 3, c->left = c->chunk_size;
            else if (*p >= '0' && *p <= '9') c->chunk_size = c->chunk_size * 16 + (*p - '0');
            else if ((*p | 32) >= 'a' && (*p | 32) <= 'f') c->chunk_size = c->chunk_size * 16 + ((*p | 32) - 'a' + 10);
            p++, n--;
            break;
        case 1: { /* the chunk */
            int64_t take = (int64_t)n < c->left ? (int64_t)n : c->left;
            body(c, p, take, now);
            p += take;
            n -= (size_t)take;
            if (!(c->left -= take)) c->chunk_state = 2;
            break;
        }
        case 2: /* the line end after it */
            if (*p == '\n') c->chunk_state = 0, c->chunk_size = 0;
            p++, n--;
            break;
        case 3: { /* the last empty line; no trailers are expected */
            char byte = *p;
            p++, n--;
            if (byte == '\n') { int closes = c->close_after; done(c); if (closes) return 0; }
            break;
        }
        }
    }
    return 1;
}

static void readable(conn *c) {
    static char buffer[READ];
    for (int turn = 0; turn < READS_A_TURN; turn++) {
        ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            if (c->busy && c->in_body && !c->chunked && c->left < 0) { c->close_after = 1; done(c); }
            else lost(c, n < 0 ? strerror(errno) : "closed before the end of an answer");
            return;
        }
        if (!feed(c, buffer, (size_t)n, now_ns()) || n < (ssize_t)sizeof buffer) return;
    }
}

static void set_target(const char *target) {
    const char *colon = strrchr(target, ':');
    if (target[0] == '/' || !colon) {
        struct sockaddr_un *u = (void *)&address;
        u->sun_family = AF_UNIX;
        strncpy(u->sun_path, target, sizeof u->sun_path - 1);
        address_len = sizeof *u;
        return;
    }
    struct sockaddr_in *in = (void *)&address;
    char host[64] = {0};
    memcpy(host, target, (size_t)(colon - target) < 63 ? (size_t)(colon - target) : 63);
    in->sin_family = AF_INET;
    in->sin_port = htons((uint16_t)atoi(colon + 1));
    if (inet_pton(AF_INET, host, &in->sin_addr) != 1) { fprintf(stderr, "not an IPv4 address: %s\n", host); exit(2); }
    address_len = sizeof *in;
    tcp = 1;
}

static void usage(void) { fprintf(stderr, "usage: load closed|streams|hold --target T -c N --seconds S ...\n"); exit(2); }

int main(int argc, char **argv) {
    char *text = NULL, *headers = strdup(""), *path = "/v1/chat/completions";
    size_t text_len = 0;
    const char *target = NULL;
    if (argc < 2) usage();
    streams = !strcmp(argv[1], "streams");
    hold = !strcmp(argv[1], "hold");
    for (int i = 2; i < argc; i++) {
        const char *a = argv[i];
        if (!strcmp(a, "--loop")) { looped = 1; continue; }
        if (i + 1 == argc) usage();
        char *v = argv[++i];
        if (!strcmp(a, "--target")) target = v;
        else if (!strcmp(a, "-c")) count = atoi(v);
        else if (!strcmp(a, "--seconds")) seconds = atof(v);
        else if (!strcmp(a, "--warmup")) warmup = atof(v);
        else if (!strcmp(a, "--rate")) rate = atof(v);
        else if (!strcmp(a, "--ramp")) ramp = atof(v);
        else if (!strcmp(a, "--chunks")) chunks = atol(v);
        else if (!strcmp(a, "--path")) path = v;
        else if (!strcmp(a, "--body")) text = v, text_len = strlen(v);
        else if (!strcmp(a, "--header")) { char *more; if (asprintf(&more, "%s%s\r\n", headers, v) < 0) return 1; headers = more; }
        else if (!strcmp(a, "--body-file")) {
            FILE *f = strcmp(v, "-") ? fopen(v, "rb") : stdin;
            size_t room = 1 << 16, n;
            if (!f) { perror(v); return 1; }
            text = malloc(room);
            while ((n = fread(text + text_len, 1, room - text_len, f)) > 0)
                if ((text_len += n) == room) text = realloc(text, room *= 2);
            fclose(f);
        } else usage();
    }
    if (!target || !text) usage();
    set_target(target);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    int head = asprintf(&request, "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n%sContent-Length: %zu\r\n\r\n", path, headers, text_len);
    request_len = (size_t)head + text_len;
    request = realloc(request, request_len + 1);
    memcpy(request + head, text, text_len);

    epfd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct itimerspec tick = {.it_interval.tv_nsec = 200000, .it_value.tv_nsec = 200000};
    int timed = (rate > 0 && !streams) || ramp > 0;
    if (timed) timerfd_settime(timer_fd, 0, &tick, NULL);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epfd, EPOLL_CTL_ADD, timer_fd, &e);
    conns = calloc((size_t)count, sizeof *conns);
    for (int i = 0; i < count; i++) { conns[i].head = malloc(hold ? 2048 : HEAD); open_conn(&conns[i]); if (i % 64 == 63) usleep(2000); }
    usleep(50000);

    int64_t start = now_ns();
    measure_from = start + (int64_t)(warmup * 1e9);
    double length = streams && !looped && rate > 0 ? ramp + (double)chunks / rate : seconds;
    measure_to = stop_at = measure_from + (int64_t)(length * 1e9);
    int64_t give_up = stop_at + (streams && !looped ? 1000000000 : 0); /* the last events may be a second late */
    if (streams && !looped) measure_to = give_up;
    for (int i = 0; i < count; i++) {
        conn *c = &conns[i];
        c->due = start + (int64_t)(streams ? ramp * 1e9 * i / count : rate > 0 ? 1e9 * i / rate : 0);
        if (c->due <= start) begin(c);
    }
    int64_t now = start;
    struct epoll_event ready[512];
    while (now < give_up) {
        int n = epoll_wait(epfd, ready, 512, 20);
        for (int i = 0; i < n; i++) {
            conn *c = ready[i].data.ptr;
            if (!c) {
                uint64_t ticks;
                if (read(timer_fd, &ticks, sizeof ticks) < 0) continue;
                continue;
            }
            if (!c->connected) { /* what broke shows at the first read */
                c->connected = 1;
                if (c->busy) push(c); else watch_out(c, 0);
            } else if (ready[i].events & EPOLLOUT) {
                if (c->busy) push(c); else watch_out(c, 0);
            }
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
        }
        now = now_ns();
        if (timed) {
            for (int i = 0; i < count; i++) {
                conn *c = &conns[i];
                if (c->busy || c->due > now || now >= stop_at || (streams && c->started)) continue;
                begin(c);
                if (!streams) c->started = c->due;
            }
        }
        if (streams && !looped && completed + errors >= count) break;
    }
    for (int i = 0; i < count; i++) unread += conns[i].busy;
    double took = (double)((now < measure_to ? now : measure_to) - measure_from) / 1e9;
    printf("{\"mode\":\"%s\",\"connections\":%d,\"seconds\":%.3f,\"requests\":%ld,\"per_second\":%.1f,\"errors\":%ld,\"unfinished\":%ld,\"reconnects\":%ld,\"bytes\":%lld",
           argv[1], count, took, requests, (double)requests / took, errors, unread, reconnects, (long long)bytes);
    printf(",\"statuses\":{");
    for (int i = 0, any = 0; i < 600; i++) if (statuses[i]) printf("%s\"%d\":%ld", any++ ? "," : "", i, statuses[i]);
    printf("}");
    if (streams) {
        printf(",\"completed\":%ld,\"events\":%ld,\"offered\":%ld,\"events_per_second\":%.1f", completed, events_seen,
               looped ? 0 : chunks * count, (double)events_seen / took);
        print_samples("first_us", &first);
        print_samples("delay_us", &delay);
    } else {
        print_samples("latency_us", &latency);
    }
    for (char *p = error_sample; *p; p++) if (*p == '"' || *p == '\\' || (unsigned char)*p < 32) *p = ' ';
    printf(",\"error\":\"%s\"}\n", error_sample);
    return 0;
}
