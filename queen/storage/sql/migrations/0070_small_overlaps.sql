-- push: where ranges of ids meet and few ids are pushed, whether the segments that are met hold any of them is looked up
-- here. Producers that push a message at a time with UUIDv7 ids, as the published clients do, meet each other all the time,
-- and were stored by a second call. What was met and cannot be told is answered as it was, for the worker to look: minted
-- segments, ids of a clock far from ours (which have keys of their own, and are not among those compared), and many ids.
-- Verdicts, arguments and locks are those of 0068_new_keys.sql.

-- Whether any of the ids of a part, 16 bytes each in its segments, may be among those that a stored segment holds. An id
-- that lies across two of those counts too: it is for the worker to look. True as well where to tell would take long: it
-- compares about a byte a nanosecond.
CREATE FUNCTION queen.may_hold(p_held bytea, p_part integer, p_parts integer[], p_ids bytea[])
RETURNS boolean LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    c_most_comparisons constant bigint := 250000;
    v_count integer;
BEGIN
    FOR i IN 1 .. cardinality(p_parts) LOOP
        CONTINUE WHEN p_parts[i] <> p_part OR p_ids[i] IS NULL;
        v_count := octet_length(p_ids[i]) / 16;
        IF v_count::bigint * octet_length(p_held) > c_most_comparisons THEN
            RETURN true;
        END IF;
        FOR at IN 0 .. v_count - 1 LOOP
            IF position(substring(p_ids[i] FROM at * 16 + 1 FOR 16) IN p_held) > 0 THEN
                RETURN true;
            END IF;
        END LOOP;
    END LOOP;
    RETURN false;
END
$$;

CREATE OR REPLACE FUNCTION queen.push(
    p_bucket integer,
    p_now timestamptz,
    p_checked boolean,
    p_may_create boolean,
    p_queue_ids uuid[],
    p_queue_versions bigint[],
    p_partition_ids uuid[],         -- ascending
    p_partition_queues uuid[],
    p_partition_names text[],
    p_keyed_min uuid[],             -- per partition: range of UUIDv7 ids among its new keys
    p_keyed_max uuid[],
    p_segment_parts integer[],      -- number of the partition, from 1
    p_counts integer[],
    p_minted boolean[],
    p_codecs smallint[],
    p_raw_bytes integer[],
    p_min_ids uuid[],
    p_max_ids uuid[],
    p_key_ids text[],
    p_transaction_ids bytea[],
    p_bodies bytea[],
    p_probe_parts integer[],        -- id ranges to check: partition, least, greatest, bound of a segment's max_id
    p_probe_min uuid[],
    p_probe_max uuid[],
    p_probe_bound uuid[],
    p_key_parts integer[],          -- keys to check, and to insert where p_key_index is not NULL
    p_keys bytea[],
    p_key_segments integer[],       -- number of the segment, from 1
    p_key_index integer[]           -- place in the segment, from 0
) RETURNS TABLE (
    verdict text, part integer, base_offset bigint, id_prefix bigint, created_at timestamptz,
    message_count integer, minted boolean, transaction_ids bytea, group_name text
) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_prefix bigint := (floor(extract(epoch FROM v_now) * 1000)::bigint << 20) + floor(random() * 524288)::bigint;
    v_found integer;
    v_trouble boolean := false;
    v_known bigint[];               -- numbers of keys that are stored already
    v_stale bigint[];               -- and of those whose message is gone
BEGIN
    IF EXISTS (
        SELECT FROM unnest(p_queue_ids, p_queue_versions) AS given (queue_id, version)
        LEFT JOIN queen.queues q ON q.queue_id = given.queue_id
        WHERE q.version IS DISTINCT FROM given.version
    ) THEN
        RETURN QUERY SELECT 'stale', 0, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::integer, NULL::boolean,
            NULL::bytea, NULL::text;
        RETURN;
    END IF;

    IF p_may_create AND EXISTS (
        SELECT FROM unnest(p_partition_ids) AS given (partition_id)
        LEFT JOIN queen.partitions p ON p.bucket = p_bucket AND p.partition_id = given.partition_id
        WHERE p.partition_id IS NULL
    ) THEN
        SELECT count(*) INTO v_found FROM (
            SELECT FROM queen.queue_buckets b
            WHERE b.bucket = p_bucket AND b.queue_id = ANY (p_queue_ids)
            ORDER BY b.queue_id FOR SHARE
        ) held;
        IF v_found < cardinality(p_queue_ids) THEN
            RETURN QUERY SELECT 'stale', 0, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::integer,
                NULL::boolean, NULL::bytea, NULL::text;
            RETURN;
        END IF;
        WITH born AS (
            INSERT INTO queen.partitions AS p (bucket, partition_id, queue_id, name, created_at)
            SELECT p_bucket, given.partition_id, given.queue_id, given.name, v_now
            FROM unnest(p_partition_ids, p_partition_queues, p_partition_names)
                AS given (partition_id, queue_id, name)
            ORDER BY given.partition_id
            ON CONFLICT ON CONSTRAINT partitions_pkey DO NOTHING
            RETURNING p.partition_id, p.queue_id
        ), counted AS (
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            SELECT p_bucket, 4, born.queue_id, count(*), '' FROM born GROUP BY born.queue_id
        )
        INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)
        SELECT p_bucket, born.partition_id, g.name, born.queue_id, 0
        FROM born JOIN queen.consumer_groups g ON g.queue_id = born.queue_id
        ORDER BY born.partition_id, g.name
        ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
    END IF;

    SELECT count(*) INTO v_found FROM (
        SELECT FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.partition_id = ANY (p_partition_ids)
        ORDER BY p.partition_id FOR NO KEY UPDATE
    ) held;
    IF v_found < cardinality(p_partition_ids) THEN
        RETURN QUERY SELECT CASE WHEN p_may_create THEN 'stale' ELSE 'unknown' END, 0, NULL::bigint, NULL::bigint,
            NULL::timestamptz, NULL::integer, NULL::boolean, NULL::bytea, NULL::text;
        RETURN;
    END IF;

    IF NOT p_checked THEN
        IF cardinality(p_keys) > 0 THEN
            SELECT array_agg(k.number) FILTER (WHERE p.first_offset <= t.message_offset),
                array_agg(k.number) FILTER (WHERE p.first_offset > t.message_offset)
            INTO v_known, v_stale
            FROM unnest(p_key_parts, p_keys) WITH ORDINALITY AS k (part, transaction_key, number)
            CROSS JOIN LATERAL (
                SELECT t.message_offset FROM queen.transaction_ids t
                WHERE t.bucket = p_bucket AND t.partition_id = p_partition_ids[k.part]
                    AND t.transaction_key = k.transaction_key LIMIT 1
            ) t
            CROSS JOIN LATERAL (
                SELECT p.first_offset FROM queen.partitions p
                WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[k.part] LIMIT 1
            ) p;
            IF v_known IS NOT NULL THEN
                RETURN QUERY
                    SELECT 'known', k.number::integer, s.base_offset, s.id_prefix, s.created_at,
                        (t.message_offset - s.base_offset)::integer, s.minted, NULL::bytea, NULL::text
                    FROM unnest(v_known) AS k (number)
                    CROSS JOIN LATERAL (
                        SELECT t.message_offset FROM queen.transaction_ids t
                        WHERE t.bucket = p_bucket AND t.partition_id = p_partition_ids[p_key_parts[k.number]]
                            AND t.transaction_key = p_keys[k.number] LIMIT 1
                    ) t
                    CROSS JOIN LATERAL (
                        SELECT * FROM queen.segments s
                        WHERE s.bucket = p_bucket AND s.partition_id = p_partition_ids[p_key_parts[k.number]]
                            AND s.base_offset <= t.message_offset
                        ORDER BY s.base_offset DESC LIMIT 1
                    ) s;
                v_trouble := v_trouble OR FOUND;
            END IF;
            -- a key whose message retention has removed is free again
            FOR i IN 1 .. coalesce(cardinality(v_stale), 0) LOOP
                DELETE FROM queen.transaction_ids t
                WHERE t.bucket = p_bucket AND t.partition_id = p_partition_ids[p_key_parts[v_stale[i]]]
                    AND t.transaction_key = p_keys[v_stale[i]];
            END LOOP;
        END IF;
        IF cardinality(p_probe_parts) > 0 THEN
            RETURN QUERY
                SELECT 'overlap', probe.part, s.base_offset, s.id_prefix, s.created_at, s.message_count, s.minted,
                    s.transaction_ids, NULL::text
                FROM unnest(p_probe_parts, p_probe_min, p_probe_max, p_probe_bound)
                    AS probe (part, least_id, greatest_id, bound)
                CROSS JOIN LATERAL (
                    SELECT * FROM queen.segments s
                    WHERE s.bucket = p_bucket AND s.partition_id = p_partition_ids[probe.part]
                        AND s.max_id >= probe.least_id AND s.max_id <= probe.bound AND s.min_id <= probe.greatest_id
                    ORDER BY s.max_id OFFSET 0
                ) s
                WHERE s.minted OR s.transaction_ids IS NULL OR p_keyed_min[probe.part] IS NOT NULL
                    OR queen.may_hold(s.transaction_ids, probe.part, p_segment_parts, p_transaction_ids);
            v_trouble := v_trouble OR FOUND;
            RETURN QUERY
                SELECT DISTINCT 'keyed', probe.part, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::integer,
                    NULL::boolean, NULL::bytea, NULL::text
                FROM unnest(p_probe_parts, p_probe_min, p_probe_max) AS probe (part, least_id, greatest_id)
                CROSS JOIN LATERAL (
                    SELECT p.keyed_min, p.keyed_max FROM queen.partitions p
                    WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[probe.part] LIMIT 1
                ) p
                WHERE p.keyed_max >= probe.least_id AND p.keyed_min <= probe.greatest_id;
            v_trouble := v_trouble OR FOUND;
        END IF;
        IF v_trouble THEN
            RETURN;
        END IF;
    END IF;

    RETURN QUERY
        WITH given AS (
            SELECT s.*, p.partition_id,
                p.next_offset + sum(s.message_count) OVER run - s.message_count AS base_offset,
                greatest(v_prefix, p.last_id_prefix + 1) + row_number() OVER run - 1 AS id_prefix,
                greatest(v_now, p.last_created_at) AS created_at
            FROM unnest(p_segment_parts, p_counts, p_minted, p_codecs, p_raw_bytes, p_min_ids, p_max_ids, p_key_ids,
                p_transaction_ids, p_bodies) WITH ORDINALITY
                AS s (part, message_count, minted, codec, raw_bytes, min_id, max_id, key_id, transaction_ids, body,
                    number)
            CROSS JOIN LATERAL (
                SELECT * FROM queen.partitions p
                WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[s.part] LIMIT 1
            ) p
            WINDOW run AS (PARTITION BY s.part ORDER BY s.number)
        ), kept AS (
            INSERT INTO queen.segments (bucket, partition_id, base_offset, message_count, created_at, id_prefix, minted,
                codec, raw_bytes, min_id, max_id, key_id, transaction_ids, body)
            SELECT p_bucket, g.partition_id, g.base_offset, g.message_count, g.created_at, g.id_prefix, g.minted,
                g.codec, g.raw_bytes,
                CASE WHEN g.minted THEN queen.message_id(g.id_prefix, g.partition_id, 0) ELSE g.min_id END,
                CASE WHEN g.minted THEN queen.message_id(g.id_prefix, g.partition_id, g.message_count - 1)
                    ELSE g.max_id END,
                g.key_id, g.transaction_ids, g.body
            FROM given g
        ), keys AS (
            INSERT INTO queen.transaction_ids (bucket, partition_id, transaction_key, message_offset)
            SELECT p_bucket, p_partition_ids[k.part], k.transaction_key, bases.of_segment[k.segment] + k.place
            FROM (SELECT array_agg(g.base_offset ORDER BY g.number) AS of_segment FROM given g) bases
            CROSS JOIN unnest(p_key_parts, p_keys, p_key_segments, p_key_index)
                AS k (part, transaction_key, segment, place)
            WHERE k.place IS NOT NULL
        ), grown AS (
            INSERT INTO queen.partitions AS p (bucket, partition_id, queue_id, name, created_at, next_offset,
                last_id_prefix, last_created_at, keyed_min, keyed_max)
            SELECT p_bucket, g.partition_id, p_partition_queues[g.part], '', max(g.created_at), sum(g.message_count),
                max(g.id_prefix), max(g.created_at), p_keyed_min[g.part], p_keyed_max[g.part]
            FROM given g GROUP BY g.part, g.partition_id
            ON CONFLICT ON CONSTRAINT partitions_pkey DO UPDATE
            SET next_offset = p.next_offset + excluded.next_offset,
                last_id_prefix = excluded.last_id_prefix,
                last_created_at = excluded.last_created_at,
                oldest_at = coalesce(p.oldest_at, excluded.last_created_at),
                keyed_min = least(p.keyed_min, excluded.keyed_min),
                keyed_max = greatest(p.keyed_max, excluded.keyed_max)
        ), counted AS (
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            SELECT p_bucket, 1, p_partition_queues[g.part], sum(g.message_count), ''
            FROM given g GROUP BY p_partition_queues[g.part]
        )
        SELECT 'stored', g.number::integer, g.base_offset, g.id_prefix, g.created_at, g.message_count, g.minted,
            NULL::bytea, NULL::text
        FROM given g;

    RETURN QUERY
        WITH idle AS (
            SELECT c.partition_id, c.group_name, c.queue_id, v_now + make_interval(secs => (
                SELECT greatest(q.delayed_processing_seconds, q.window_buffer_seconds)
                FROM queen.queues q WHERE q.queue_id = c.queue_id)) AS due
            FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.partition_id = ANY (p_partition_ids) AND c.ready_at IS NULL
            ORDER BY c.partition_id, c.group_name FOR NO KEY UPDATE OF c
        )
        INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at)
        SELECT p_bucket, idle.partition_id, idle.group_name, idle.queue_id, 0, idle.due FROM idle
        WHERE idle.due IS NOT NULL  -- NULL: the queue went away meanwhile
        ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET ready_at = excluded.ready_at
        RETURNING 'woken', array_position(p_partition_ids, c.partition_id), NULL::bigint, NULL::bigint, c.ready_at,
            NULL::integer, NULL::boolean, NULL::bytea, c.group_name;
END
$$;
