-- claim and ack, again: what is common is done for many in one statement. Functions of their own, beside those that servers
-- of before go on using and that do what is rare.

-- claim, for many pops. Arguments and answer are those of queen.claim_v2.
-- Consecutive rows alike are served together: requests of one row each, for one partition of any name, all with a lease
-- or all without, where the queue has neither delay, window nor age and the group no start in time. The first of them gets
-- the cursor that has been ready longest, the next the next. Who finds nothing that way is served by queen.claim_v2, and so
-- are all others, each in its place: also what it does for cursors that need more than a look (skips, nothing left) is
-- left to it.
CREATE FUNCTION queen.claim_v3(
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
    c_small_bytes constant integer := 65536;  -- of raw envelopes sent with a claim
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_total integer := cardinality(p_requests);
    v_at integer := 1;
    v_to integer;
    v_served integer;
    v_leased boolean;
    v_lease_end timestamptz;
    v_partitions uuid[];
    v_names text[];
    v_born timestamptz[];
    v_firsts bigint[];
    v_ends bigint[];
    v_nexts bigint[];
    v_retries integer[];
    v_attempts integer[];
    v_drained uuid[];               -- partitions of which all is taken, locked as idling needs
    v_oldest timestamptz;
    v_moved bigint;
    v_due timestamptz;
BEGIN
    WHILE v_at <= v_total LOOP
        v_to := v_at;
        v_leased := p_lease_ids[v_at] IS NOT NULL;
        IF p_partition_ids[v_at] IS NULL AND p_partition_limits[v_at] = 1 THEN
            WHILE v_to < v_total AND p_queue_ids[v_to + 1] = p_queue_ids[v_at] AND p_groups[v_to + 1] = p_groups[v_at]
                AND p_partition_ids[v_to + 1] IS NULL AND p_partition_limits[v_to + 1] = 1
                AND (p_lease_ids[v_to + 1] IS NOT NULL) = v_leased
            LOOP
                v_to := v_to + 1;
            END LOOP;
            -- a row before or after it of the same request: its queues are alternatives
            IF p_requests[v_at] = p_requests[v_at - 1] OR p_requests[v_to] = p_requests[v_to + 1] THEN
                v_lease_end := NULL;
            ELSE
                SELECT v_now + make_interval(secs => coalesce(nullif(q.lease_seconds, 0), 60)) INTO v_lease_end
                FROM queen.queues q
                JOIN queen.consumer_groups g ON g.queue_id = q.queue_id AND g.name = p_groups[v_at]
                WHERE q.queue_id = p_queue_ids[v_at] AND g.floor_at IS NULL
                    AND q.delayed_processing_seconds <= 0 AND q.window_buffer_seconds <= 0
                    AND NOT (q.retry_delay_enforced AND q.retry_delay_ms > 0)
                    AND NOT (q.ttl_enforced AND q.ttl_seconds > 0)
                    AND q.max_wait_time_seconds <= 0 AND NOT (q.retention_enabled AND q.retention_seconds > 0);
            END IF;
        ELSE
            v_lease_end := NULL;
        END IF;

        v_served := 0;
        IF v_lease_end IS NOT NULL THEN
            SELECT array_agg(r.partition_id), array_agg(r.name), array_agg(r.born_at), array_agg(r.first),
                array_agg(least(r.next_offset, r.first + p_batches[v_at + r.place - 1])), array_agg(r.next_offset),
                array_agg(CASE WHEN r.first > r.committed THEN 0 ELSE r.retry_count END),
                array_agg(CASE WHEN r.first > r.committed THEN 0 ELSE r.attempt END),
                min(r.ready_at), sum(r.first - r.committed)
            INTO v_partitions, v_names, v_born, v_firsts, v_ends, v_nexts, v_retries, v_attempts, v_oldest, v_moved
            FROM (
                SELECT row_number() OVER () AS place, u.*
                FROM (
                    SELECT c.partition_id, c.ready_at, c.committed, c.retry_count, c.attempt, c.skips,
                        greatest(c.committed, p.first_offset) AS first,
                        p.name, p.next_offset, p.created_at AS born_at
                    FROM queen.cursors c
                    CROSS JOIN LATERAL (
                        SELECT * FROM queen.partitions p
                        WHERE p.bucket = p_bucket AND p.partition_id = c.partition_id LIMIT 1
                    ) p
                    WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[v_at] AND c.group_name = p_groups[v_at]
                        AND c.ready_at <= v_now
                    ORDER BY c.ready_at LIMIT v_to - v_at + 1
                    FOR NO KEY UPDATE OF c SKIP LOCKED
                ) u
                WHERE u.skips IS NULL AND u.first < u.next_offset
            ) r;
            v_served := coalesce(cardinality(v_partitions), 0);
        END IF;

        IF v_served > 0 THEN
            v_drained := '{}';
            IF NOT v_leased THEN
                -- of which nothing is left: idle, but only under the lock that every push takes, and as it is then
                SELECT coalesce(array_agg(p.partition_id), '{}') INTO v_drained
                FROM (SELECT unnest(v_partitions) AS partition_id, unnest(v_ends) AS end_offset,
                    unnest(v_nexts) AS next_offset OFFSET 0) n
                CROSS JOIN LATERAL (
                    SELECT p.partition_id FROM queen.partitions p
                    WHERE n.end_offset >= n.next_offset AND p.bucket = p_bucket AND p.partition_id = n.partition_id
                        AND p.next_offset <= n.end_offset
                    LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
                ) p;
                SELECT v_moved + sum(n.taken) INTO v_moved
                FROM (SELECT unnest(v_ends) - unnest(v_firsts) AS taken OFFSET 0) n;
            END IF;
            -- rows that are locked and so exist: changed by ON CONFLICT, which finds each by its key
            IF v_leased THEN
                INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at, retry_count,
                    attempt, lease_id, lease_expires_at, lease_first, lease_end, lease_epoch)
                SELECT p_bucket, n.partition_id, p_groups[v_at], p_queue_ids[v_at], n.first, v_lease_end, n.retry_count,
                    n.attempt + 1, n.lease_id, v_lease_end, n.first, n.end_offset, p_epoch
                FROM (SELECT unnest(v_partitions) AS partition_id, unnest(v_firsts) AS first, unnest(v_ends) AS end_offset,
                    unnest(v_retries) AS retry_count, unnest(v_attempts) AS attempt,
                    unnest(p_lease_ids[v_at : v_at + v_served - 1]) AS lease_id OFFSET 0) n
                ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET committed = excluded.committed,
                    ready_at = excluded.ready_at, retry_count = excluded.retry_count, attempt = excluded.attempt,
                    lease_id = excluded.lease_id, lease_expires_at = excluded.lease_expires_at,
                    lease_first = excluded.lease_first, lease_end = excluded.lease_end,
                    lease_epoch = excluded.lease_epoch, acked = NULL;
            ELSE
                INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at, consumed_at)
                SELECT p_bucket, n.partition_id, p_groups[v_at], p_queue_ids[v_at], n.end_offset,
                    CASE WHEN n.partition_id = ANY (v_drained) THEN NULL ELSE v_now END, v_now
                FROM (SELECT unnest(v_partitions) AS partition_id, unnest(v_ends) AS end_offset OFFSET 0) n
                ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET committed = excluded.committed,
                    ready_at = excluded.ready_at, consumed_at = excluded.consumed_at, retry_count = 0, attempt = 0,
                    lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL,
                    acked = NULL;
            END IF;
            IF v_moved <> 0 THEN
                INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
                VALUES (p_bucket, 5, p_queue_ids[v_at], v_moved, p_groups[v_at]);
            END IF;

            -- each claim, and behind it its first segments as long as they are small together
            RETURN QUERY
            SELECT o.verdict, p_requests[v_at + n.place - 1], p_queue_ids[v_at], n.partition_id, n.name, n.first,
                n.end_offset, n.retry_count, n.attempt + 1, NULL::double precision, o.base_offset, o.message_count,
                o.created_at, o.id_prefix, o.minted, o.codec, o.raw_bytes, o.key_id, o.body, o.erased, NULL::bigint[]
            FROM (SELECT generate_series(1, v_served) AS place, unnest(v_partitions) AS partition_id,
                unnest(v_names) AS name, unnest(v_firsts) AS first, unnest(v_ends) AS end_offset,
                unnest(v_nexts) AS next_offset, unnest(v_retries) AS retry_count, unnest(v_attempts) AS attempt,
                unnest(v_born) AS born_at OFFSET 0) n
            CROSS JOIN LATERAL (
                SELECT 'claimed' AS verdict, NULL::bigint AS base_offset,
                    CASE WHEN v_leased THEN 0 ELSE (n.next_offset - n.end_offset)::integer END AS message_count,
                    n.born_at AS created_at, NULL::bigint AS id_prefix, NULL::boolean AS minted, NULL::smallint AS codec,
                    0 AS raw_bytes, NULL::text AS key_id, NULL::bytea AS body, NULL::integer[] AS erased
                UNION ALL
                SELECT 'segment', s.base_offset, s.message_count, s.created_at, s.id_prefix, s.minted, s.codec, s.raw_bytes,
                    s.key_id, s.body, s.erased
                FROM (
                    SELECT s.*, sum(s.raw_bytes) OVER (ORDER BY s.base_offset ROWS UNBOUNDED PRECEDING) AS so_far
                    FROM queen.segments s
                    WHERE s.bucket = p_bucket AND s.partition_id = n.partition_id AND s.base_offset < n.end_offset
                        AND s.base_offset >= (
                            SELECT b.base_offset FROM queen.segments b
                            WHERE b.bucket = p_bucket AND b.partition_id = n.partition_id AND b.base_offset <= n.first
                            ORDER BY b.base_offset DESC LIMIT 1)
                    ORDER BY s.base_offset LIMIT 256
                ) s
                WHERE s.so_far <= c_small_bytes
            ) o;

            IF v_served > v_to - v_at THEN
                -- all of them were served: is there more?
                SELECT c.ready_at INTO v_due FROM queen.cursors c
                WHERE c.bucket = p_bucket AND c.queue_id = p_queue_ids[v_at] AND c.group_name = p_groups[v_at]
                    AND c.ready_at >= v_oldest
                ORDER BY c.ready_at LIMIT 1;
                verdict := 'nothing'; request := p_requests[v_at]; queue_id := p_queue_ids[v_at]; raw_bytes := 0;
                due_seconds := CASE WHEN v_due IS NOT NULL
                    THEN greatest(extract(epoch FROM v_due - v_now)::double precision, 0) END;
                RETURN NEXT;
            END IF;
        END IF;

        IF v_served <= v_to - v_at THEN
            -- rows of one request stay together: what is not served here goes there up to the next run
            IF v_lease_end IS NULL THEN
                WHILE v_to < v_total AND (p_requests[v_to + 1] = p_requests[v_to]
                    OR p_partition_ids[v_to + 1] IS NOT NULL OR p_partition_limits[v_to + 1] <> 1)
                LOOP
                    v_to := v_to + 1;
                END LOOP;
            END IF;
            RETURN QUERY SELECT * FROM queen.claim_v2(p_bucket, v_now, p_epoch, p_requests[v_at + v_served : v_to],
                p_queue_ids[v_at + v_served : v_to], p_groups[v_at + v_served : v_to],
                p_partition_ids[v_at + v_served : v_to], p_batches[v_at + v_served : v_to],
                p_partition_limits[v_at + v_served : v_to], p_lease_ids[v_at + v_served : v_to]);
        END IF;
        v_at := v_to + 1;
    END LOOP;
END
$$;

-- ack, for many cursors. Arguments and answer are those of queen.ack, but p_whole, and rows come in any order.
-- p_whole says of a run that it completes its messages under a lease and is the only one of its cursor. Where that lease
-- lives and the run is all of it, the cursors are moved together; the others are queen.ack's. All cursors are locked first,
-- in the order of the runs.
CREATE FUNCTION queen.ack_v2(
    p_bucket integer,
    p_now timestamptz,
    p_epoch integer,
    p_straight boolean,
    p_partition_ids uuid[],
    p_groups text[],
    p_requests integer[],
    p_lease_ids uuid[],
    p_statuses smallint[],
    p_firsts bigint[],
    p_ends bigint[],
    p_whole boolean[]
) RETURNS TABLE (run integer, lost boolean, released boolean, dead boolean, retry_count integer,
    pending boolean)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_total integer := cardinality(p_partition_ids);
    v_runs integer[];               -- the numbers of those that are moved together
    v_rest integer[];               -- and of the others
    v_partitions uuid[];
    v_groups text[];
    v_queues uuid[];
    v_leases uuid[];
    v_before bigint[];              -- where the cursors stood
    v_ends bigint[];
    v_retries integer[];
    v_drained integer[];            -- places among them of which nothing is left, locked as idling needs
BEGIN
    IF NOT (true = ANY (p_whole)) THEN
        RETURN QUERY SELECT * FROM queen.ack(p_bucket, v_now, p_epoch, p_straight, p_partition_ids, p_groups, p_requests,
            p_lease_ids, p_statuses, p_firsts, p_ends);
        RETURN;
    END IF;
    SELECT array_agg(n.run) FILTER (WHERE n.together), array_agg(n.partition_id) FILTER (WHERE n.together),
        array_agg(n.group_name) FILTER (WHERE n.together), array_agg(n.queue_id) FILTER (WHERE n.together),
        array_agg(n.lease_id) FILTER (WHERE n.together), array_agg(n.committed) FILTER (WHERE n.together),
        array_agg(n.end_offset) FILTER (WHERE n.together), array_agg(n.retry_count) FILTER (WHERE n.together),
        array_agg(n.run) FILTER (WHERE NOT n.together)
    INTO v_runs, v_partitions, v_groups, v_queues, v_leases, v_before, v_ends, v_retries, v_rest
    FROM (
        SELECT g.run, g.partition_id, g.group_name, g.lease_id, g.end_offset, c.queue_id, c.committed, c.retry_count,
            g.whole AND coalesce(c.lease_id = g.lease_id AND c.lease_expires_at > v_now AND c.lease_epoch = p_epoch
                AND c.lease_first = g.first_offset AND c.lease_end = g.end_offset AND c.committed <= g.first_offset
                AND c.acked IS NULL AND c.skips IS NULL, false) AS together
        FROM (SELECT generate_series(1, v_total) AS run, unnest(p_partition_ids) AS partition_id,
            unnest(p_groups) AS group_name, unnest(p_lease_ids) AS lease_id, unnest(p_firsts) AS first_offset,
            unnest(p_ends) AS end_offset, unnest(p_whole) AS whole OFFSET 0) g
        LEFT JOIN LATERAL (
            SELECT * FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.partition_id = g.partition_id AND c.group_name = g.group_name
            LIMIT 1 FOR NO KEY UPDATE
        ) c ON true
        OFFSET 0
    ) n;

    IF v_runs IS NOT NULL THEN
        SELECT coalesce(array_agg(n.place), '{}') INTO v_drained
        FROM (SELECT generate_series(1, cardinality(v_runs)) AS place, unnest(v_partitions) AS partition_id,
            unnest(v_ends) AS end_offset OFFSET 0) n
        CROSS JOIN LATERAL (
            SELECT FROM queen.partitions p
            WHERE p.bucket = p_bucket AND p.partition_id = n.partition_id AND p.next_offset <= n.end_offset
            LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
        ) p;
        -- rows that are locked and so exist: changed by ON CONFLICT, which finds each by its key
        INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at, completed_lease_id,
            consumed_at)
        SELECT p_bucket, n.partition_id, n.group_name, n.queue_id, n.end_offset,
            CASE WHEN n.place = ANY (v_drained) THEN NULL ELSE v_now END, n.lease_id, v_now
        FROM (SELECT generate_series(1, cardinality(v_runs)) AS place, unnest(v_partitions) AS partition_id,
            unnest(v_groups) AS group_name, unnest(v_queues) AS queue_id, unnest(v_leases) AS lease_id,
            unnest(v_ends) AS end_offset OFFSET 0) n
        ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET committed = excluded.committed, ready_at = excluded.ready_at,
            completed_lease_id = excluded.completed_lease_id, consumed_at = excluded.consumed_at, retry_count = 0,
            attempt = 0, lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL,
            lease_epoch = NULL, acked = NULL;
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 5, n.queue_id, sum(n.moved), n.group_name
        FROM (SELECT unnest(v_queues) AS queue_id, unnest(v_groups) AS group_name,
            unnest(v_ends) - unnest(v_before) AS moved OFFSET 0) n
        GROUP BY n.queue_id, n.group_name;
        RETURN QUERY
        SELECT n.run, false, true, false, n.retry_count, n.place <> ALL (v_drained)
        FROM (SELECT generate_series(1, cardinality(v_runs)) AS place, unnest(v_runs) AS run,
            unnest(v_retries) AS retry_count OFFSET 0) n;
    END IF;

    IF v_rest IS NOT NULL THEN
        RETURN QUERY
        SELECT v_rest[a.run], a.lost, a.released, a.dead, a.retry_count, a.pending
        FROM queen.ack(p_bucket, v_now, p_epoch, p_straight,
            ARRAY(SELECT p_partition_ids[at] FROM unnest(v_rest) AS at), ARRAY(SELECT p_groups[at] FROM unnest(v_rest) AS at),
            ARRAY(SELECT p_requests[at] FROM unnest(v_rest) AS at), ARRAY(SELECT p_lease_ids[at] FROM unnest(v_rest) AS at),
            ARRAY(SELECT p_statuses[at] FROM unnest(v_rest) AS at), ARRAY(SELECT p_firsts[at] FROM unnest(v_rest) AS at),
            ARRAY(SELECT p_ends[at] FROM unnest(v_rest) AS at)) a;
    END IF;
END
$$;
