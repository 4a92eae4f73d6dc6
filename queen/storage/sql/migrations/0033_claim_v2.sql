-- claim, again: ttl, the retry delay of a lease that runs out, dead letters of what has expired. A function of its own beside
-- the one of 0060_claim_idles.sql, which servers of before go on using.

-- Claim for the requests given, in order; rows of one request are its queues in order of preference.
-- Verdicts:
--   claimed       offsets first_offset <= o < end_offset of a partition are for `request`, without those in `skipped`;
--                 message_count is how many more another pop could have from there at once, created_at when the
--                 partition was born: one that was removed and came again has the same id and begins anew
--   unregistered  the group is not registered on the queue, or the queue is gone
--   nothing       nothing (more) in this row's queue; due_seconds until something may be ready (NULL: only a push helps).
--                 A request that was filled gets one too, the first of those of one queue and group at the end: 0 means
--                 that somebody else may look
--   segment       follows a claim: its first segments, in order, as long as they are small together: a small pop needs
--                 no second call, and a large segment that the worker may hold in its cache is not sent again
-- Consecutive rows of the same queue and group that name no partition stop at the first that found nothing.
-- Waits for no lock: cursors are taken with SKIP LOCKED, and so is the partition row that idling needs.
-- An autoAck that takes the last message makes its cursor idle, so that nobody has to look once more to find that
-- out, and the next push says whom it wakes. It does so under the lock that every push takes, or not at all.
-- What is ready is fetched row by row from one scan: every claim moves its entry in the index that is scanned, and a scan
-- begun anew for each would pass all entries left behind, so that a pop of n partitions read n² of them. Scans are
-- bounded all the same, for a server that fetches (and locks) a whole result at once.
-- In a row `claimed` or `nothing` raw_bytes says how many cursors have passed messages, since the row before, that expired
-- and are to become dead letters: a worker should see to it.
-- Cursors are put off (by delay, window or retry delay) only under the delay lock, see 0031_races.sql; without it they are
-- looked at again.
CREATE OR REPLACE FUNCTION queen.claim_v2(
    p_bucket integer,
    p_now timestamptz,
    p_epoch integer,
    p_requests integer[],
    p_queue_ids uuid[],
    p_groups text[],
    p_partition_ids uuid[],         -- NULL: any partition
    p_batches integer[],            -- messages over all partitions of the request
    p_partition_limits integer[],   -- partitions of the request
    p_lease_ids uuid[]              -- NULL: autoAck
) RETURNS TABLE (
    verdict text, request integer, queue_id uuid, partition_id uuid, partition_name text,
    first_offset bigint, end_offset bigint, retry_count integer, attempt integer, due_seconds double precision,
    base_offset bigint, message_count integer, created_at timestamptz, id_prefix bigint, minted boolean,
    codec smallint, raw_bytes integer, key_id text, body bytea, erased integer[], skipped bigint[]
) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_sort = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    -- when a push holds the partition that might be idle: past this call, but not past the next
    c_look_again constant interval := '1 microsecond';
    c_small_bytes constant integer := 65536;  -- of raw envelopes sent with a claim
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_request integer := -1;
    v_left integer;
    v_partitions_left integer;
    v_queue record;
    v_scan refcursor;               -- what is ready, from v_from on
    v_from timestamptz;
    v_limit integer;
    v_fetched integer;
    v_again boolean;                -- a push came between a scan and the look at its partition
    v_cursor record;
    v_first bigint;
    v_end bigint;
    v_base bigint;
    v_next bigint;
    v_created timestamptz;
    v_postponed timestamptz;
    v_due timestamptz;
    v_lease_end timestamptz;
    v_segment record;
    v_bytes integer;
    v_empty_queue uuid;
    v_empty_group text;
    v_empty_due double precision;
    v_moved bigint := 0;            -- by how much cursors of the group below have moved, not yet counted
    v_moved_queue uuid;
    v_moved_group text;
    v_ready timestamptz;
    v_filled integer[] := '{}';     -- rows whose requests got all they wanted
    v_seen timestamptz[] := '{}';   -- and the oldest entry each met: what is before it was not to be had
    v_oldest timestamptz;
    v_last integer := 0;
    v_found boolean;
    v_held boolean;                 -- this call holds the delay lock of the queue; NULL: not asked for
    v_floor timestamptz;            -- what was created before it is not delivered
    v_passed bigint;
    v_expired integer := 0;         -- cursors that passed what is to become dead letters, not yet told
    i integer;
BEGIN
    FOR at IN 1 .. cardinality(p_requests) LOOP
        i := at;
        IF p_requests[i] <> v_request THEN
            v_request := p_requests[i];
            v_left := p_batches[i];
            v_partitions_left := p_partition_limits[i];
        END IF;
        CONTINUE WHEN v_left <= 0 OR v_partitions_left <= 0;

        IF v_moved <> 0 AND (v_moved_queue <> p_queue_ids[i] OR v_moved_group <> p_groups[i]) THEN
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            VALUES (p_bucket, 5, v_moved_queue, v_moved, v_moved_group);
            v_moved := 0;
        END IF;
        v_moved_queue := p_queue_ids[i]; v_moved_group := p_groups[i];

        request := v_request; queue_id := p_queue_ids[i]; partition_id := NULL; partition_name := NULL;
        first_offset := NULL; end_offset := NULL; retry_count := NULL; attempt := NULL; due_seconds := NULL;
        skipped := NULL; erased := NULL; raw_bytes := NULL;

        IF p_partition_ids[i] IS NULL AND v_empty_queue = p_queue_ids[i] AND v_empty_group = p_groups[i] THEN
            verdict := 'nothing'; due_seconds := v_empty_due;
            RETURN NEXT;
            CONTINUE;
        END IF;

        v_held := NULL;
        LOOP
            SELECT coalesce(nullif(q.lease_seconds, 0), 60) AS lease_seconds,
                make_interval(secs => q.delayed_processing_seconds) AS delay,
                make_interval(secs => q.window_buffer_seconds) AS quiet,
                q.delayed_processing_seconds > 0 AS delays, q.window_buffer_seconds > 0 AS waits_for_quiet,
                CASE WHEN q.retry_delay_enforced THEN q.retry_delay_ms ELSE 0 END AS retry_delay_ms,
                least(
                    CASE WHEN q.ttl_enforced AND q.ttl_seconds > 0 THEN q.ttl_seconds END,
                    CASE WHEN q.max_wait_time_seconds > 0 THEN q.max_wait_time_seconds END,
                    CASE WHEN q.retention_enabled AND q.retention_seconds > 0 THEN q.retention_seconds END) AS age,
                q.dead_letter_queue AS keeps, g.floor_at
            INTO v_queue
            FROM queen.queues q
            JOIN queen.consumer_groups g ON g.queue_id = q.queue_id AND g.name = p_groups[i]
            WHERE q.queue_id = p_queue_ids[i];
            v_found := FOUND;
            EXIT WHEN NOT v_found OR v_held IS NOT NULL
                OR NOT (v_queue.delays OR v_queue.waits_for_quiet OR v_queue.retry_delay_ms > 0);
            -- it may put cursors off: hold the lock, then look at the options again
            v_held := pg_try_advisory_xact_lock_shared(queen.delay_lock(p_bucket, p_queue_ids[i]));
        END LOOP;
        IF NOT v_found THEN
            verdict := 'unregistered';
            RETURN NEXT;
            CONTINUE;
        END IF;
        v_lease_end := v_now + make_interval(secs => v_queue.lease_seconds);
        v_floor := v_queue.floor_at;
        IF v_queue.age IS NOT NULL THEN
            v_floor := greatest(v_floor, v_now - make_interval(secs => v_queue.age));
        END IF;

        v_scan := NULL; v_oldest := NULL; v_from := '-infinity'; v_limit := v_partitions_left; v_again := false;
        WHILE v_left > 0 AND v_partitions_left > 0 LOOP
            IF v_scan IS NULL THEN
                v_fetched := 0;
                IF p_partition_ids[i] IS NULL THEN
                    OPEN v_scan FOR
                        SELECT c.partition_id, c.ready_at, c.committed, c.retry_count, c.attempt, c.skips,
                            p.name, p.next_offset, p.first_offset, p.last_created_at, p.created_at AS born_at
                        FROM queen.cursors c
                        CROSS JOIN LATERAL (
                            SELECT * FROM queen.partitions p
                            WHERE p.bucket = p_bucket AND p.partition_id = c.partition_id LIMIT 1
                        ) p
                        WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[i] AND c.group_name = p_groups[i]
                            AND c.ready_at >= v_from AND c.ready_at <= v_now
                        ORDER BY c.ready_at LIMIT v_limit
                        FOR NO KEY UPDATE OF c SKIP LOCKED;
                ELSE
                    OPEN v_scan FOR
                        SELECT c.partition_id, c.ready_at, c.committed, c.retry_count, c.attempt, c.skips,
                            p.name, p.next_offset, p.first_offset, p.last_created_at, p.created_at AS born_at
                        FROM queen.cursors c
                        CROSS JOIN LATERAL (
                            SELECT * FROM queen.partitions p
                            WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[i] LIMIT 1
                        ) p
                        WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i]
                            AND coalesce(c.ready_at, 'infinity') <= v_now  -- not to be found by the index of the ready
                        ORDER BY c.partition_id
                        FOR NO KEY UPDATE OF c SKIP LOCKED;
                END IF;
            END IF;
            FETCH v_scan INTO v_cursor;
            IF NOT FOUND THEN
                CLOSE v_scan;
                v_scan := NULL;
                EXIT WHEN v_fetched = 0 AND NOT v_again;
                IF v_again THEN
                    v_from := '-infinity'; v_again := false;
                END IF;
                v_limit := least(2 * v_limit, 1000);
                CONTINUE;
            END IF;
            v_fetched := v_fetched + 1;
            v_from := v_cursor.ready_at;
            v_oldest := coalesce(v_oldest, v_from);

            v_first := greatest(v_cursor.committed, v_cursor.first_offset);
            v_end := v_cursor.next_offset;
            v_postponed := NULL;

            -- expired, evicted, or from before the group's start: pass them
            IF v_first < v_end AND v_floor IS NOT NULL THEN
                v_passed := v_first;
                SELECT s.base_offset INTO v_base FROM queen.segments s
                WHERE s.bucket = p_bucket AND s.partition_id = v_cursor.partition_id AND s.base_offset <= v_first
                ORDER BY s.base_offset DESC LIMIT 1;
                SELECT s.base_offset INTO v_next FROM queen.segments s
                WHERE s.bucket = p_bucket AND s.partition_id = v_cursor.partition_id
                    AND s.base_offset >= coalesce(v_base, v_first) AND s.created_at >= v_floor
                ORDER BY s.base_offset LIMIT 1;
                v_first := greatest(v_first, coalesce(v_next, v_end));
                IF v_queue.keeps AND v_queue.age IS NOT NULL AND v_passed < v_first THEN
                    IF v_queue.floor_at IS NOT NULL THEN  -- what is from before its start was never for the group
                        v_passed := queen.offset_after(p_bucket, v_cursor.partition_id, v_passed, v_first,
                            v_queue.floor_at - interval '1 microsecond');
                    END IF;
                    IF v_passed < v_first THEN
                        INSERT INTO queen.expired_ranges AS e (bucket, partition_id, group_name, first_offset,
                            end_offset, queue_id, retry_count, reason, expired_at)
                        VALUES (p_bucket, v_cursor.partition_id, p_groups[i], v_passed, v_first, p_queue_ids[i],
                            v_cursor.retry_count, coalesce(queen.expiry_reason(p_queue_ids[i]), 'Expired'), v_now)
                        ON CONFLICT ON CONSTRAINT expired_ranges_pkey DO UPDATE
                        SET end_offset = greatest(e.end_offset, excluded.end_offset);
                        v_expired := v_expired + 1;
                    END IF;
                END IF;
            END IF;
            IF v_cursor.skips IS NOT NULL THEN
                v_first := coalesce((SELECT upper(r) FROM unnest(v_cursor.skips) r WHERE r @> v_first), v_first);
            END IF;

            IF v_first > v_cursor.committed THEN  -- what had failed is passed
                v_cursor.retry_count := 0; v_cursor.attempt := 0;
            END IF;

            IF v_first >= v_end THEN
                -- drained: idle, but only under the lock that every push takes
                SELECT p.next_offset INTO v_next FROM queen.partitions p
                WHERE p.bucket = p_bucket AND p.partition_id = v_cursor.partition_id
                ORDER BY p.partition_id FOR NO KEY UPDATE SKIP LOCKED;
                IF FOUND AND v_next > v_end THEN
                    v_again := true;
                    CONTINUE;
                END IF;
                v_moved := v_moved + greatest(v_first - v_cursor.committed, 0);
                v_postponed := CASE WHEN FOUND THEN NULL ELSE v_now + c_look_again END;
                UPDATE queen.cursors c SET committed = greatest(c.committed, v_first), ready_at = v_postponed,
                    lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL,
                    acked = NULL, skips = queen.skips_from(c.skips, v_first)
                WHERE c.bucket = p_bucket AND c.partition_id = v_cursor.partition_id AND c.group_name = p_groups[i];
                CONTINUE;
            END IF;

            IF v_queue.waits_for_quiet AND v_cursor.last_created_at + v_queue.quiet > v_now THEN
                v_postponed := v_cursor.last_created_at + v_queue.quiet;
            ELSE
                v_end := least(v_end, v_first + v_left);
                IF v_queue.delays THEN
                    -- the first message that is too young hides what is behind it
                    SELECT s.base_offset INTO v_base FROM queen.segments s
                    WHERE s.bucket = p_bucket AND s.partition_id = v_cursor.partition_id AND s.base_offset <= v_first
                    ORDER BY s.base_offset DESC LIMIT 1;
                    SELECT s.base_offset, s.created_at INTO v_next, v_created FROM queen.segments s
                    WHERE s.bucket = p_bucket AND s.partition_id = v_cursor.partition_id
                        AND s.base_offset >= coalesce(v_base, v_first) AND s.base_offset < v_end
                        AND s.created_at + v_queue.delay > v_now
                    ORDER BY s.base_offset LIMIT 1;
                    IF FOUND THEN
                        v_end := greatest(v_next, v_first);
                        v_postponed := CASE WHEN v_end = v_first THEN v_created + v_queue.delay END;
                    END IF;
                END IF;
            END IF;
            IF v_postponed IS NOT NULL THEN
                v_moved := v_moved + greatest(v_first - v_cursor.committed, 0);
                UPDATE queen.cursors c SET committed = greatest(c.committed, v_first),
                    ready_at = CASE WHEN v_held THEN v_postponed ELSE v_now + c_look_again END,
                    retry_count = v_cursor.retry_count, attempt = v_cursor.attempt,
                    lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL,
                    acked = NULL
                WHERE c.bucket = p_bucket AND c.partition_id = v_cursor.partition_id AND c.group_name = p_groups[i];
                CONTINUE;
            END IF;

            message_count := 0;
            IF p_lease_ids[i] IS NULL THEN
                v_ready := v_now;
                v_next := v_cursor.next_offset;
                IF v_end >= v_next THEN
                    SELECT p.next_offset INTO v_next FROM queen.partitions p
                    WHERE p.bucket = p_bucket AND p.partition_id = v_cursor.partition_id
                    ORDER BY p.partition_id FOR NO KEY UPDATE SKIP LOCKED;
                    IF FOUND AND v_next <= v_end THEN
                        v_ready := NULL;
                    END IF;
                END IF;
                message_count := CASE WHEN v_queue.delays THEN 0 ELSE coalesce(v_next - v_end, 0) END;
                v_moved := v_moved + v_end - v_cursor.committed;
                UPDATE queen.cursors c SET committed = v_end, ready_at = v_ready, retry_count = 0, attempt = 0,
                    lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL,
                    acked = NULL, skips = queen.skips_from(c.skips, v_first), consumed_at = v_now
                WHERE c.bucket = p_bucket AND c.partition_id = v_cursor.partition_id AND c.group_name = p_groups[i];
            ELSE
                v_moved := v_moved + v_first - v_cursor.committed;
                v_ready := v_lease_end;
                IF v_held AND v_queue.retry_delay_ms > 0 THEN  -- a lease that runs out is a failure too
                    v_ready := v_ready + queen.backoff(v_queue.retry_delay_ms, v_cursor.attempt + 1, random());
                END IF;
                UPDATE queen.cursors c SET committed = v_first, ready_at = v_ready,
                    retry_count = v_cursor.retry_count, attempt = v_cursor.attempt + 1,
                    lease_id = p_lease_ids[i], lease_expires_at = v_lease_end, lease_first = v_first,
                    lease_end = v_end, lease_epoch = p_epoch,
                    acked = c.skips * int8multirange(int8range(v_first, v_end)),
                    skips = queen.skips_from(c.skips, v_first)
                WHERE c.bucket = p_bucket AND c.partition_id = v_cursor.partition_id AND c.group_name = p_groups[i];
            END IF;
            v_left := v_left - (v_end - v_first)::integer;
            v_partitions_left := v_partitions_left - 1;
            verdict := 'claimed'; partition_id := v_cursor.partition_id; partition_name := v_cursor.name;
            first_offset := v_first; end_offset := v_end; retry_count := v_cursor.retry_count;
            attempt := v_cursor.attempt + 1; due_seconds := NULL; created_at := v_cursor.born_at;
            raw_bytes := v_expired; v_expired := 0;
            skipped := CASE WHEN v_cursor.skips IS NOT NULL THEN queen.skipped(v_cursor.skips, v_first, v_end) END;
            RETURN NEXT;
            skipped := NULL;

            verdict := 'segment';
            v_bytes := 0;
            FOR v_segment IN
                SELECT s.* FROM queen.segments s
                WHERE s.bucket = p_bucket AND s.partition_id = v_cursor.partition_id AND s.base_offset < v_end
                    AND s.base_offset >= (
                        SELECT b.base_offset FROM queen.segments b
                        WHERE b.bucket = p_bucket AND b.partition_id = v_cursor.partition_id AND b.base_offset <= v_first
                        ORDER BY b.base_offset DESC LIMIT 1)
                ORDER BY s.base_offset LIMIT 256
            LOOP
                v_bytes := v_bytes + v_segment.raw_bytes;
                EXIT WHEN v_bytes > c_small_bytes;
                base_offset := v_segment.base_offset; message_count := v_segment.message_count;
                created_at := v_segment.created_at; id_prefix := v_segment.id_prefix; minted := v_segment.minted;
                codec := v_segment.codec; raw_bytes := v_segment.raw_bytes; key_id := v_segment.key_id;
                body := v_segment.body; erased := v_segment.erased;
                RETURN NEXT;
            END LOOP;
            body := NULL; erased := NULL;
        END LOOP;
        IF v_scan IS NOT NULL THEN
            CLOSE v_scan;
        END IF;
        IF v_left <= 0 OR v_partitions_left <= 0 THEN
            v_filled := v_filled || i;
            v_seen := v_seen || v_oldest;
            CONTINUE;
        END IF;

        -- not filled: say when it is worth to look again. A cursor that is ready but locked by another call counts
        -- as due at once; the caller waits a little before it looks.
        IF p_partition_ids[i] IS NULL THEN
            SELECT c.ready_at INTO v_due FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[i] AND c.group_name = p_groups[i]
                AND c.ready_at IS NOT NULL
            ORDER BY c.ready_at LIMIT 1;
        ELSE
            SELECT c.ready_at INTO v_due FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i];
        END IF;
        verdict := 'nothing'; partition_id := NULL; partition_name := NULL; first_offset := NULL; end_offset := NULL;
        retry_count := NULL; attempt := NULL; raw_bytes := v_expired; v_expired := 0;
        -- (greatest alone would make 0 of NULL)
        due_seconds := CASE WHEN v_due IS NOT NULL
            THEN greatest(extract(epoch FROM v_due - v_now)::double precision, 0) END;
        RETURN NEXT;
        IF p_partition_ids[i] IS NULL THEN
            v_empty_queue := p_queue_ids[i]; v_empty_group := p_groups[i]; v_empty_due := due_seconds;
        END IF;
    END LOOP;
    IF v_moved <> 0 THEN
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        VALUES (p_bucket, 5, v_moved_queue, v_moved, v_moved_group);
    END IF;

    -- of those that were filled: is there more? Asked once for all of one queue and group, now that all have taken theirs
    verdict := 'nothing'; partition_id := NULL; partition_name := NULL; first_offset := NULL; end_offset := NULL;
    retry_count := NULL; attempt := NULL; base_offset := NULL; message_count := NULL; skipped := NULL;
    raw_bytes := NULL;
    FOR k IN 1 .. cardinality(v_filled) LOOP
        i := v_filled[k];
        CONTINUE WHEN v_last > 0 AND p_queue_ids[i] = p_queue_ids[v_last] AND p_groups[i] = p_groups[v_last]
            AND p_partition_ids[i] IS NOT DISTINCT FROM p_partition_ids[v_last];
        v_last := i;
        request := p_requests[i]; queue_id := p_queue_ids[i];
        IF p_partition_ids[i] IS NULL THEN
            SELECT c.ready_at INTO v_due FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[i] AND c.group_name = p_groups[i]
                AND c.ready_at >= v_seen[k]
            ORDER BY c.ready_at LIMIT 1;
        ELSE
            SELECT c.ready_at INTO v_due FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i];
        END IF;
        due_seconds := CASE WHEN v_due IS NOT NULL
            THEN greatest(extract(epoch FROM v_due - v_now)::double precision, 0) END;
        RETURN NEXT;
    END LOOP;
END
$$;
