/* A llama-server that computes nothing: what the benchmarks put behind routers and proxies.
 *
 * One thread, one epoll. It takes llama-server's command line (--host PATH.sock, or --host IP --port N; every other
 * flag is ignored), answers GET /health, /props, /slots and /metrics, and any POST with
 *   - 597 bytes of JSON, after "mock_delay_ms" if the body names it;
 *   - when the body has "stream":true, events of 275 bytes, each in an HTTP chunk of its own: "mock_chunks" of them,
 *     "mock_rate" a second (0: as fast as they are taken), then `data: [DONE]`.
 * Each event holds the moment it was made (CLOCK_MONOTONIC, ns), so a reader on this machine can tell its age.
 * Made when it is due, also while the reader's socket is full: delay that a slow reader causes is seen as delay.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { EVENT_BYTES = 275, JSON_BYTES = 597, PEEK = 4096, IN = 16384, FULL_SPEED_BATCH = 16, TURN_BATCHES = 8 };

typedef struct conn {
    int fd, events, heap_at; /* heap_at: place in the heap of timers, -1: none */
    int busy;                /* an answer is under way: what follows is read later */
    int streaming, close_after;
    char in[IN];
    size_t in_len;
    size_t body_left, peek_len;
    char peek[PEEK + 1]; /* the first bytes of the body: what it asks of us stands there */
    int reading_body;
    char *out;
    size_t out_len, out_at, out_room;
    int64_t interval, due;
    long chunks_left, chunks_made;
    struct conn *next_dead;
} conn;

static int epfd, timer_fd, listen_fd;
static conn **heap;
static size_t heap_len, heap_room;
static conn *dead;
static char json_body[JSON_BYTES + 1], event_text[EVENT_BYTES + 1];
static size_t stamp_at;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* --- timers: a binary heap by due ---------------------------------------------------------------- */

static void put(size_t at, conn *c) { heap[at] = c; c->heap_at = (int)at; }

static void sift(size_t at) {
    conn *c = heap[at];
    while (at && heap[(at - 1) / 2]->due > c->due) { put(at, heap[(at - 1) / 2]); at = (at - 1) / 2; }
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= heap_len) break;
        if (child + 1 < heap_len && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        put(at, heap[child]);
        at = child;
    }
    put(at, c);
}

static void timer_set(conn *c, int64_t due) {
    c->due = due;
    if (c->heap_at < 0) {
        if (heap_len == heap_room) heap = realloc(heap, (heap_room = heap_room ? 2 * heap_room : 1024) * sizeof *heap);
        put(heap_len++, c);
    }
    sift((size_t)c->heap_at);
}

static void timer_drop(conn *c) {
    if (c->heap_at < 0) return;
    size_t at = (size_t)c->heap_at;
    c->heap_at = -1;
    conn *last = heap[--heap_len];
    if (at < heap_len) { put(at, last); sift(at); }
}

static void timer_arm(void) {
    struct itimerspec when = {0};
    if (heap_len) {
        when.it_value.tv_sec = heap[0]->due / 1000000000;
        when.it_value.tv_nsec = heap[0]->due % 1000000000;
    }
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* --- connections --------------------------------------------------------------------------------- */

static void watch(conn *c, int events) {
    if (c->events != events) {
        struct epoll_event e = {.events = (uint32_t)events, .data.ptr = c};
        epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &e);
        c->events = events;
    }
}

static void drop(conn *c) {
    if (c->fd < 0) return;
    timer_drop(c);
    close(c->fd);
    c->fd = -1;
    free(c->out);
    c->out = NULL;
    c->next_dead = dead; /* freed after this round of events, which may still name it */
    dead = c;
}

static void out_add(conn *c, const void *data, size_t length) {
    if (c->out_at == c->out_len) c->out_at = c->out_len = 0;
    if (c->out_len + length > c->out_room) {
        memmove(c->out, c->out + c->out_at, c->out_len - c->out_at);
        c->out_len -= c->out_at;
        c->out_at = 0;
        while (c->out_len + length > c->out_room) c->out_room = c->out_room ? 2 * c->out_room : 8192;
        c->out = realloc(c->out, c->out_room);
    }
    memcpy(c->out + c->out_len, data, length);
    c->out_len += length;
}

static int idle_events(conn *c) { return EPOLLRDHUP | (c->busy && c->in_len == IN ? 0 : EPOLLIN); }

/* Send what there is; 0: the connection is gone. */
static int flush(conn *c) {
    while (c->out_at < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) { drop(c); return 0; }
            watch(c, idle_events(c) | EPOLLOUT);
            return 1;
        }
        c->out_at += (size_t)n;
    }
    if (c->close_after && !c->busy) { drop(c); return 0; }
    watch(c, idle_events(c) | (c->streaming && !c->interval ? EPOLLOUT : 0));
    return 1;
}

static void add_event(conn *c, int64_t now) {
    char chunk[EVENT_BYTES + 16];
    int head = sprintf(chunk, "%x\r\n", EVENT_BYTES);
    memcpy(chunk + head, event_text, EVENT_BYTES);
    char *p = chunk + head + stamp_at + 20;
    for (int i = 0; i < 20; i++, now /= 10) *--p = (char)('0' + now % 10);
    memcpy(chunk + head + EVENT_BYTES, "\r\n", 2);
    out_add(c, chunk, (size_t)head + EVENT_BYTES + 2);
    c->chunks_made++;
    if (--c->chunks_left == 0) {
        static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
        out_add(c, end, sizeof end - 1);
        c->streaming = c->busy = 0;
    }
}

static void serve_input(conn *c);

/* Events as fast as they are taken, but not for ever: others want a turn. */
static void full_speed(conn *c) {
    for (int turn = 0; turn < TURN_BATCHES && c->streaming; turn++) {
        int64_t now = now_ns();
        for (int i = 0; i < FULL_SPEED_BATCH && c->streaming; i++) add_event(c, now);
        if (!flush(c) || c->out_at < c->out_len) return;
    }
    if (!c->busy) serve_input(c);
}

static void answer(conn *c, const char *type, const char *body, size_t length) {
    char head[256];
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n",
                     type, length, c->close_after ? "Connection: close\r\n" : "");
    out_add(c, head, (size_t)n);
    out_add(c, body, length);
}

static long number_after(conn *c, const char *name, long otherwise) {
    char *p = strstr(c->peek, name);
    if (!p) return otherwise;
    p += strlen(name);
    while (*p == '"' || *p == ':' || *p == ' ') p++;
    return strtol(p, NULL, 10);
}

static int wants_stream(conn *c) {
    char *p = strstr(c->peek, "\"stream\"");
    if (!p) return 0;
    for (p += 8; *p == ' ' || *p == ':'; p++) {}
    return !strncmp(p, "true", 4);
}

static void answer_post(conn *c) {
    if (wants_stream(c)) {
        long rate = number_after(c, "\"mock_rate\"", 0);
        static const char head[] = "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
                                   "Transfer-Encoding: chunked\r\n\r\n";
        c->chunks_left = number_after(c, "\"mock_chunks\"", 100);
        if (c->chunks_left < 1) c->chunks_left = 1;
        c->interval = rate > 0 ? 1000000000 / rate : 0;
        c->busy = c->streaming = 1;
        out_add(c, head, sizeof head - 1);
        if (c->interval) {
            int64_t now = now_ns();
            add_event(c, now);
            if (c->streaming) timer_set(c, now + c->interval);
        }
        return;
    }
    long delay = number_after(c, "\"mock_delay_ms\"", 0);
    if (delay > 0) {
        c->busy = 1;
        timer_set(c, now_ns() + delay * 1000000);
    } else {
        answer(c, "application/json", json_body, JSON_BYTES);
    }
}

static void answer_get(conn *c, const char *path) {
    static const char health[] = "{\"status\":\"ok\"}";
    static const char props[] = "{\"default_generation_settings\":{\"n_ctx\":4096},\"total_slots\":1024,\"model_path\":\"mock\"}";
    static const char metrics[] = "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 0\n";
    if (!strncmp(path, "/props", 6)) answer(c, "application/json", props, sizeof props - 1);
    else if (!strncmp(path, "/slots", 6)) answer(c, "application/json", "[]", 2);
    else if (!strncmp(path, "/metrics", 8)) answer(c, "text/plain; version=0.0.4", metrics, sizeof metrics - 1);
    else answer(c, "application/json", health, sizeof health - 1);
}

/* Answer every whole request in the buffer, up to one whose answer takes its time. */
static void serve_input(conn *c) {
    size_t at = 0;
    while (!c->busy && c->fd >= 0) {
        if (c->reading_body) {
            size_t have = c->in_len - at, take = have < c->body_left ? have : c->body_left;
            size_t keep = take < PEEK - c->peek_len ? take : PEEK - c->peek_len;
            memcpy(c->peek + c->peek_len, c->in + at, keep);
            c->peek_len += keep;
            c->body_left -= take;
            at += take;
            if (c->body_left) break;
            c->reading_body = 0;
            c->peek[c->peek_len] = 0;
            answer_post(c);
            continue;
        }
        char *start = c->in + at, *end = memmem(start, c->in_len - at, "\r\n\r\n", 4);
        if (!end) {
            if (c->in_len - at == IN) drop(c);
            break;
        }
        end[2] = 0;
        char *length = strcasestr(start, "\r\ncontent-length:");
        c->close_after = strcasestr(start, "\r\nconnection: close") != NULL;
        c->body_left = length ? strtoul(length + 17, NULL, 10) : 0;
        at = (size_t)(end - c->in) + 4;
        if (!strncmp(start, "GET ", 4)) {
            answer_get(c, start + 4);
        } else {
            c->reading_body = 1;
            c->peek_len = 0;
        }
    }
    if (c->fd < 0) return;
    memmove(c->in, c->in + at, c->in_len - at);
    c->in_len -= at;
    flush(c);
}

static void readable(conn *c) {
    for (;;) {
        if (c->in_len == IN) { watch(c, idle_events(c) | (c->events & EPOLLOUT)); return; }
        size_t room = IN - c->in_len;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) { drop(c); return; }
        c->in_len += (size_t)n;
        if (!c->busy) serve_input(c);
        if (c->fd < 0 || (size_t)n < room) return;
    }
}

static void due_now(void) {
    uint64_t ticks;
    if (read(timer_fd, &ticks, sizeof ticks) < 0) { /* nothing was due after all */ }
    while (heap_len && heap[0]->due <= now_ns()) {
        conn *c = heap[0];
        if (c->streaming) {
            add_event(c, now_ns());
            if (c->streaming) timer_set(c, c->due + c->interval);
            else timer_drop(c);
        } else {
            timer_drop(c);
            c->busy = 0;
            answer(c, "application/json", json_body, JSON_BYTES);
        }
        if (flush(c) && !c->busy && c->in_len) serve_input(c);
    }
}

static void accept_all(int tcp) {
    for (;;) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;
        if (fd < 0) return;
        if (tcp) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->heap_at = -1;
        c->events = EPOLLIN | EPOLLRDHUP;
        struct epoll_event e = {.events = (uint32_t)c->events, .data.ptr = c};
        epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &e);
    }
}

/* --- the bodies ---------------------------------------------------------------------------------- */

static void padded(char *to, size_t size, const char *start, const char *end) {
    size_t a = strlen(start), b = strlen(end);
    memcpy(to, start, a);
    memset(to + a, 'x', size - a - b);
    memcpy(to + size - b, end, b);
}

static void make_bodies(void) {
    padded(json_body, JSON_BYTES,
           "{\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"",
           "\"}}],\"created\":1700000000,\"model\":\"mock\",\"object\":\"chat.completion\",\"usage\":{\"completion_tokens\":12,"
           "\"prompt_tokens\":34,\"total_tokens\":46},\"id\":\"chatcmpl-mock\",\"timings\":{\"cache_n\":0,\"prompt_n\":34,"
           "\"prompt_ms\":12.5,\"predicted_n\":12,\"predicted_ms\":120.0,\"predicted_per_token_ms\":10.0}}");
    padded(event_text, EVENT_BYTES,
           "data: {\"made\":\"00000000000000000000\",\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"content\":\"",
           "\"}}],\"created\":1700000000,\"id\":\"chatcmpl-mock\",\"model\":\"mock\",\"object\":\"chat.completion.chunk\"}\n\n");
    stamp_at = (size_t)(strstr(event_text, "000000000000") - event_text);
}

static int listen_at(const char *host, int port) {
    size_t length = strlen(host);
    int fd, one = 1;
    if (length > 5 && !strcmp(host + length - 5, ".sock")) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        if (length >= sizeof address.sun_path) return -1;
        memcpy(address.sun_path, host, length);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        unlink(host);
        if (bind(fd, (void *)&address, sizeof address)) return -1;
    } else {
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
        if (inet_pton(AF_INET, host, &address.sin_addr) != 1) return -1;
        fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (void *)&address, sizeof address)) return -1;
    }
    return listen(fd, 4096) ? -1 : fd;
}

static void stop(int number) { (void)number; _exit(0); }

int main(int argc, char **argv) {
    const char *host = "127.0.0.1";
    int port = 8080;
    for (int i = 1; i + 1 < argc; i++) {
        if (!strcmp(argv[i], "--host")) host = argv[i + 1];
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    make_bodies();
    epfd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    listen_fd = listen_at(host, port);
    if (listen_fd < 0) { fprintf(stderr, "cannot listen on %s %d: %s\n", host, port, strerror(errno)); return 1; }
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listen_fd};
    epoll_ctl(epfd, EPOLL_CTL_ADD, listen_fd, &e);
    e.data.ptr = &timer_fd;
    epoll_ctl(epfd, EPOLL_CTL_ADD, timer_fd, &e);
    struct epoll_event ready[512];
    for (;;) {
        timer_arm();
        int count = epoll_wait(epfd, ready, 512, -1);
        for (int i = 0; i < count; i++) {
            void *what = ready[i].data.ptr;
            uint32_t events = ready[i].events;
            if (what == &listen_fd) { accept_all(strstr(host, ".sock") == NULL); continue; }
            if (what == &timer_fd) { due_now(); continue; }
            conn *c = what;
            if (c->fd < 0) continue;
            if (events & (EPOLLERR | EPOLLHUP)) { drop(c); continue; }
            if (events & EPOLLIN) readable(c);
            if (c->fd >= 0 && events & EPOLLRDHUP) { drop(c); continue; } /* half-closed is closed, as in llama-server */
            if (c->fd >= 0 && events & EPOLLOUT) {
                if (!flush(c)) continue;
                if (c->streaming && !c->interval && c->out_at == c->out_len) full_speed(c);
                else if (!c->busy && c->in_len) serve_input(c);
            }
        }
        while (dead) { conn *next = dead->next_dead; free(dead); dead = next; }
    }
}
