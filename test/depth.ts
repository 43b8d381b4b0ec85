/** How many cases property tests try. */

/** `VIPSEC_TEST_DEPTH` times as many as usual: for the night, or after a change to what they are about. */
const { VIPSEC_TEST_DEPTH = '1' } = process.env;
const DEPTH = Number(VIPSEC_TEST_DEPTH);
if (!(DEPTH > 0)) throw new Error('VIPSEC_TEST_DEPTH is a positive number');

export function runs(usual: number): number {
  return Math.ceil(usual * DEPTH);
}
